"""Refuses what nudging cannot do, and says what to give instead. It knows calls and what models can do, never text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.generation import GenerationMode

from .cache_layers import has_recurrent_state
from .reading_mode import reading_mode, supports_row_rollback
from .transformers_private import (
    CACHE_NAMES,
    cache_argument,
    has_no_weights,
    overrides_generate,
    reads_more_than_text,
    takes_static_cache,
    waits_for_other_ranks,
)


def validate_causal_lm(model: Any, whose: str, argument: str, needs_weights: bool = True) -> None:
    """Raises a `ValueError` unless a model is a decoder-only language model of transformers, with weights if needed.

    Args:
        model: the argument that was given.
        whose, argument: how the error calls the model and the argument.
    """
    name = type(model).__name__
    if not hasattr(model, "generation_config"):
        if hasattr(getattr(model, "module", None), "generation_config"):
            raise ValueError(
                f"The {whose} is wrapped in {name}, which cannot generate: give the wrapped model, its `.module`."
            )
        raise ValueError(
            f"`{argument}` must be a causal language model of transformers, got {name}: "
            "load one with `AutoModelForCausalLM.from_pretrained`."
        )
    if model.config.is_encoder_decoder:
        raise ValueError(f"The {whose} is an encoder-decoder model, {name}: give a decoder-only one.")
    if needs_weights and has_no_weights(model):
        raise ValueError(
            f"The {whose}, {name}, is on the meta device, where it has no weights: load it with `from_pretrained`, or "
            "call its `to_empty(device=...)` and load the weights."
        )


def validate_call(model: Any, nudging_model: Any, config: Any, arguments: Mapping[str, Any]) -> None:
    """Raises a `ValueError` if a call asks for something that nudging cannot do.

    Args:
        model: the base.
        nudging_model: the nudging model, or `None` if none was given.
        config: the generation config, as `generate` merges it.
        arguments: the arguments of `generate` as the caller gave them, by their names.
    """
    if nudging_model is None:
        raise ValueError(
            "There is no nudging model: give one as `nudging_model=`, or name one as `nudging_model_name_or_path` in "
            "the base's generation_config.json."
        )
    validate_causal_lm(nudging_model, "nudging model", "nudging_model")
    models: dict[str, Any] = {"base": model, "nudging model": nudging_model}
    for whose, lm in models.items():
        if not reading_mode(lm).is_causal:
            raise ValueError(
                f"The {whose}, {type(lm).__name__}, does not read ids strictly from left to right (its output after "
                "a token depends on later tokens, or on more than the ids): give a decoder-only model. A model like "
                "BERT is one with `is_decoder=True` in its config."
            )
        if config.use_cache:
            validate_cache(lm, whose, config.cache_implementation == "static")
    for name, why in UNSUPPORTED.items():
        given = getattr(config, name) if hasattr(config, name) else arguments.get(name)
        if not _is_disabled(name, given):
            raise ValueError(f"`{name}={_quote(given)}` is not supported by nudging: {why}.")
    mode = config.get_generation_mode(arguments.get("assistant_model"))
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):  # A later version may have other modes.
        raise ValueError(
            f"Nudging decodes greedily or by sampling, got the mode {mode.value!r}: leave out the arguments that "
            "select it."
        )
    if config.cache_implementation not in (None, "dynamic", "dynamic_full", "static"):
        raise ValueError(
            "Nudging rolls its caches back row by row, which is impossible with "
            f"`cache_implementation={config.cache_implementation!r}`: leave it out, or give 'static', whose passes "
            "can be compiled."
        )
    if waits_for_other_ranks(model):
        raise ValueError(
            "The base is sharded by DeepSpeed ZeRO-3 or FSDP, where all ranks must make the same number of passes, "
            "but nudging makes as many as its rows need: gather the weights on each rank before generating."
        )


def validate_prompt_tensors(input_ids: Any, attention_mask: Any, name: str) -> None:
    """Raises a `ValueError` if prompts or their mask are not tensors of shape (batch_size, length).

    Args:
        input_ids, attention_mask: either may be `None`, but a mask without ids is an error.
        name: what the names of both arguments begin with, such as "nudging".
    """
    ids, mask = input_ids, attention_mask
    if ids is not None and (not isinstance(ids, torch.Tensor) or ids.ndim != 2):
        raise ValueError(f"`{name}_input_ids` must be a tensor of shape (batch_size, length), got {shape_of(ids)}.")
    if mask is not None and (ids is None or not isinstance(mask, torch.Tensor) or mask.shape != ids.shape):
        raise ValueError(
            f"`{name}_attention_mask` must have the shape of `{name}_input_ids`, {shape_of(ids)}, got "
            f"{shape_of(mask)}."
        )


def shape_of(value: Any) -> str:
    """How an error calls a value: a tensor by its shape, anything else by its type."""
    return str(tuple(value.shape)) if isinstance(value, torch.Tensor) else type(value).__name__


def validate_streamer(streamer: Any, rows: int) -> None:
    """Raises a `ValueError` if a streamer would receive the tokens of several answers."""
    if streamer is not None and rows > 1:
        raise ValueError(f"`streamer` takes a single answer, got {rows} rows: generate them one at a time.")


def validate_cache(model: Any, whose: str, is_static: bool = False) -> None:
    """Raises a `ValueError` if the rows of a model's cache cannot be rolled back.

    Args:
        model: a causal language model.
        whose: how the error calls the model.
        is_static: whether the cache is to have a fixed size.
    """
    if cache_argument(model) is None:
        return
    name = type(model).__name__
    if (problem := reading_mode(model).cache_problem) is not None:
        raise ValueError(
            f"The cache of the {whose}, {name}, cannot be used, because {problem}: give another model, or "
            "`use_cache=False`, with which each pass reads the whole text."
        )
    shares_cache = reading_mode(model).rows_share_cache
    if is_static and (has_recurrent_state(model) or not shares_cache or not takes_static_cache(model)):
        raise ValueError(
            f"The {whose}, {name}, cannot use a cache of a fixed size: leave out `cache_implementation='static'`."
        )


def validate_multimodal_inputs(model: Any, more: list[str], use_cache: bool, is_static: bool) -> None:
    """Raises a `ValueError` if inputs other than ids cannot be read into the cache once, before decoding.

    Args:
        model: the base.
        more: the names of these inputs.
        use_cache, is_static: whether a cache is used, and whether it has a fixed size.
    """
    name, given = type(model).__name__, ", ".join(f"`{each}`" for each in more)
    if not reads_more_than_text(model):
        raise ValueError(f"The base, {name}, reads text alone, got {given}: leave out everything but text.")
    if overrides_generate(model):
        raise ValueError(
            f"The base, {name}, reads {given} in its own `generate`, which nudging does not call: give its language "
            "model, with text alone."
        )
    if not supports_row_rollback(model):
        raise ValueError(
            f"The base, {name}, has its own kind of cache, into which {given} cannot be read with padded rows: give "
            "its language model, with text alone."
        )
    if not use_cache:
        raise ValueError(
            f"Inputs other than text are read once, into the cache, got {given}: leave out `use_cache=False`."
        )
    if is_static:
        raise ValueError(
            f"Inputs other than text need a cache that grows, got {given}: leave out `cache_implementation='static'`."
        )


_BEAMS = "it decodes greedily or by sampling; leave it out"
_ASSISTED = "the nudging model's text is the draft; leave it out, and set `num_draft_tokens` for its length"
_NEGATIVE = "it belongs to `guidance_scale`; leave it out"

# Arguments of `generate` and fields of its config that nudging does not support: why not, and what to give instead.
UNSUPPORTED = {
    "custom_generate": "it replaces the whole decoding loop; leave it out",
    **dict.fromkeys(CACHE_NAMES, "each row's cache is rolled back on its own; pass the whole text as `input_ids`"),
    "inputs_embeds": "the nudging model reads the text of the prompt; pass `input_ids`",
    "position_ids": "positions are counted from `attention_mask`; leave them out",
    "negative_prompt_ids": _NEGATIVE,
    "negative_prompt_attention_mask": _NEGATIVE,
    "synced_gpus": "each rank makes as many passes as its rows need; leave it out",
    "num_beams": _BEAMS,
    "num_beam_groups": _BEAMS,
    "diversity_penalty": _BEAMS,
    "constraints": "they belong to beam search; leave them out, or use `prefix_allowed_tokens_fn`",
    "force_words_ids": "they belong to beam search; leave them out, or use `prefix_allowed_tokens_fn`",
    "penalty_alpha": "it asks for contrastive search; leave it out",
    "dola_layers": "it asks for DoLa decoding; leave it out",
    "assistant_model": "give the small aligned model as `nudging_model`",
    "assistant_tokenizer": "give the nudging model's as `nudging_tokenizer`",
    "prompt_lookup_num_tokens": _ASSISTED,
    "assistant_early_exit": _ASSISTED,
    "assistant_ensemble_weight": _ASSISTED,
    "speculation_type": _ASSISTED,
    "use_mtp": _ASSISTED,
    "guidance_scale": "its processor keeps its own cache, which cannot be rolled back; leave it out",
    "watermarking_config": "its processor needs one call for each token, in order; leave it out",
    "token_healing": "it changes the base's prompt, but not the nudging model's; leave it out",
    "forced_bos_token_id": "the nudging model writes the first word; put the token at the end of the prompt",
    "forced_eos_token_id": "only the nudging model ends an answer; use `max_new_tokens`",
    "prefill_chunk_size": "the prompt is read in the pass that verifies the first draft; leave it out",
    "output_attentions": "passes read several tokens at a time; leave it out",
    "output_hidden_states": "passes read several tokens at a time; leave it out",
}
# Values with which a number among these arguments has no effect.
_DISABLED_VALUES = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0,
    "penalty_alpha": 0,
    "guidance_scale": 1,
}


def _is_disabled(name: str, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value is None or value is False
    return value == _DISABLED_VALUES.get(name)


def _quote(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 40 else f"<{type(value).__name__}>"
