"""What a request to vLLM says, as arguments of `nudging_hf.generate`. It imports nothing of vLLM.

The parameters of nudging stand in `vllm_xargs` (`SamplingParams.extra_args`): `nudge_threshold`, `nudge_gate` and the
other fields of `NudgingConfig`, `nudging_input_ids` (the nudging model's prompt), and `nudging: 0` for the plain base.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import AutoTokenizer, GenerationConfig

from ...core.config import NudgingConfig
from ...count_penalties import CountPenalties

# The draft length belongs to the engine, whose step runs all requests.
KNOBS = tuple(name for name in NudgingConfig.field_names() if name != "num_draft_tokens")
_OTHERS = ("nudging", "nudging_input_ids")
# Extra arguments that vLLM itself reads.
_OF_VLLM = ("kv_transfer_params", "session_id")

# What a request can ask of vLLM and a nudged request cannot have: attribute, how it is called, and why.
_REFUSED = (
    ("structured_outputs", "a grammar or JSON schema", "it would bind the base alone"),
    ("thinking_token_budget", "`thinking_token_budget`", "the budget would be forced against the gate"),
    ("repetition_detection", "`repetition_detection`", "it is not known to the nudging model"),
    ("trace_decode_token_ids", "`trace_decode_token_ids`", "it replaces what is sampled"),
    ("logprob_token_ids", "`logprob_token_ids`", "only the most probable tokens are reported"),
    ("watermarking", "`watermarking`", "it would mark the base's tokens alone"),
)


def hub_arguments(options: Mapping[str, Any]) -> dict[str, Any]:
    """How the nudging model is loaded, by the options of `additional_config`."""
    return {key: options[key] for key in ("revision", "trust_remote_code") if options.get(key) is not None}


def nudging_tokenizer(options: Mapping[str, Any]) -> Any:
    """Loads the nudging model's tokenizer, by the options of `additional_config`."""
    return AutoTokenizer.from_pretrained(options.get("tokenizer") or options["model"], **hub_arguments(options))


def base_arguments(model_config: Any) -> dict[str, Any]:
    """How the base's config and tokenizer are loaded, by vLLM's `ModelConfig`."""
    names = ("tokenizer", "tokenizer_revision", "revision", "trust_remote_code")
    return {name: value for name in names if (value := getattr(model_config, name, None))}


def base_tokenizer(base: str, arguments: Mapping[str, Any]) -> Any:
    """Loads the base's tokenizer.

    Args:
        base: the folder or Hub name of the base.
        arguments: the [`base_arguments`].
    """
    hub = {"revision": arguments.get("tokenizer_revision"), "trust_remote_code": arguments.get("trust_remote_code")}
    given = {name: value for name, value in hub.items() if value}
    return AutoTokenizer.from_pretrained(arguments.get("tokenizer") or base, **given)


def is_plain(extra_args: Mapping[str, Any] | None) -> bool:
    """Whether a request asks for the base alone.

    Raises:
        ValueError: if `nudging` is neither 0 nor 1.
    """
    value = (extra_args or {}).get("nudging", 1)
    if value not in (0, 1):
        raise ValueError(f"`nudging` must be 0 (the plain base) or 1, got {value!r}.")
    return not value


def nudging_arguments(extra_args: Mapping[str, Any] | None) -> dict[str, Any]:
    """The parameters of nudging that a request gives, with `nudging_input_ids` as a list of ids.

    Raises:
        ValueError: for unknown names and for values out of range.
    """
    extra = {name: value for name, value in (extra_args or {}).items() if name not in _OF_VLLM}
    if unknown := sorted(set(extra) - {*KNOBS, *_OTHERS}):
        names = ", ".join((*KNOBS, *_OTHERS))
        raise ValueError(f"`vllm_xargs` may hold {names}, got {', '.join(map(repr, unknown))}.")
    knobs = {name: extra[name] for name in KNOBS if extra.get(name) is not None}
    if knobs.get("takeover_on_agreement") in (0, 1):  # `vllm_xargs` holds numbers and no booleans.
        knobs["takeover_on_agreement"] = bool(knobs["takeover_on_agreement"])
    NudgingConfig.resolve([knobs])  # It raises for values out of range.
    ids = extra.get("nudging_input_ids")
    if ids is not None:
        is_list = isinstance(ids, list) and ids
        if not is_list or not all(isinstance(i, int) and i >= 0 for i in ids):
            raise ValueError(f"`nudging_input_ids` must be a list of at least one id, got {ids!r}.")
        knobs["nudging_input_ids"] = ids
    return knobs


def validate_params(params: Any, logprobs_mode: str = "raw_logprobs") -> None:
    """Raises a `ValueError` for a request that nudging cannot answer as it was meant.

    Args:
        params: vLLM's `SamplingParams`.
        logprobs_mode: of vLLM's model config.
    """
    if is_plain(params.extra_args):
        return
    nudging_arguments(params.extra_args)
    for name, what, why in _REFUSED:
        if getattr(params, name, None):
            raise ValueError(f"A nudged request cannot have {what}: {why}. Leave it out, or say `nudging: 0`.")
    if params.logprobs is not None and logprobs_mode != "raw_logprobs":
        raise ValueError(
            f"A nudged request has the base's raw logprobs, and `--logprobs-mode` is {logprobs_mode!r}: start vLLM "
            "with `--logprobs-mode raw_logprobs`, or leave out `logprobs`."
        )


def generate_arguments(
    params: Any, ends: Mapping[str, Any], prompt_length: int, max_new_tokens: int
) -> dict[str, Any]:
    """A request's sampling as arguments of `generate`.

    Stop strings stay with vLLM, which finds them in the text. Where there are drafts, vLLM itself refuses `min_p` and
    `logit_bias`.

    Args:
        params: vLLM's `SamplingParams`.
        ends: the fields `bos_token_id`, `eos_token_id` (a list) and `pad_token_id` of the base's generation config.
        prompt_length: tokens of the prompt.
        max_new_tokens: how many tokens the answer can have.
    """
    config = GenerationConfig(**ends, max_new_tokens=max_new_tokens, do_sample=params.temperature > 0)
    if params.stop_token_ids:
        config.eos_token_id = [*ends["eos_token_id"], *params.stop_token_ids]
    if params.temperature > 0:
        config.temperature, config.top_p = params.temperature, params.top_p
        config.top_k = max(0, params.top_k)  # 0 and -1 mean all tokens in vLLM, and 0 does in transformers.
    config.repetition_penalty = params.repetition_penalty
    config.bad_words_ids = params.bad_words_token_ids or None
    fewest = max_new_tokens if params.ignore_eos else params.min_tokens
    config.min_new_tokens = min(fewest, max_new_tokens) or None
    arguments: dict[str, Any] = {"generation_config": config}
    if params.presence_penalty or params.frequency_penalty:
        penalties = CountPenalties(params.presence_penalty, params.frequency_penalty, prompt_length)
        arguments["logits_processor"] = [penalties]
    if params.allowed_token_ids:
        allowed = list(params.allowed_token_ids)
        arguments["prefix_allowed_tokens_fn"] = lambda batch, ids: allowed
    return arguments
