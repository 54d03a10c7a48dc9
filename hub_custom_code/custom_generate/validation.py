"""What nudging refuses, and what to give instead. It knows a call and what a model can do, never text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.generation import GenerationMode

from .cache_layers import keeps_state
from .reading_mode import Rows, has_common_cache, reading_mode
from .transformers_private import (
    CACHE_NAMES,
    cache_argument,
    has_no_weights,
    overrides_generate,
    reads_more_than_text,
    takes_static_cache,
    waits_for_other_ranks,
)


def refuse_what_is_no_language_model(model: Any, whose: str, argument: str) -> None:
    """Raises a `ValueError` for what is no causal language model of transformers, with weights, that can be called.

    Args:
        whose: how the error calls the model.
        argument: the name of the argument that the model was given as.
    """
    name = type(model).__name__
    if not hasattr(model, "generation_config"):
        if hasattr(getattr(model, "module", None), "generation_config"):
            raise ValueError(
                f"The {whose} is wrapped in {name}, which cannot generate: give the model inside, its `.module`."
            )
        raise ValueError(
            f"`{argument}` must be a causal language model of transformers, got {name}: "
            "load it with `AutoModelForCausalLM.from_pretrained`."
        )
    if model.config.is_encoder_decoder:
        raise ValueError(f"The {whose} is an encoder-decoder model, {name}: give a decoder-only one.")
    if has_no_weights(model):
        raise ValueError(
            f"The {whose}, {name}, is on the meta device, where it has no weights: load it with `from_pretrained`, or "
            "call its `to_empty(device=...)` and fill it."
        )


def refuse_what_nudging_cannot_do(model: Any, nudging_model: Any, config: Any, arguments: Mapping[str, Any]) -> None:
    """Raises a `ValueError` that says what was given and what to give instead.

    Args:
        model, nudging_model: causal language models, or `None` for a nudging model that was not given.
        config: the generation config, as `generate` merges it.
        arguments: the arguments of `generate`, by name.
    """
    if nudging_model is None:
        raise ValueError(
            "There is no nudging model: give one as `nudging_model=`, or name one as `nudging_model_name_or_path` in "
            "the base's generation_config.json."
        )
    refuse_what_is_no_language_model(nudging_model, "nudging model", "nudging_model")
    models: dict[str, Any] = {"base": model, "nudging model": nudging_model}
    for whose, lm in models.items():
        if not reading_mode(lm).is_causal:
            raise ValueError(
                f"The {whose}, {type(lm).__name__}, does not read ids from left to right alone (what it says after a "
                "token depends on later ones, or on more than its ids): give a decoder-only model; BERT's kind is one "
                "with `is_decoder=True` in its config."
            )
        if config.use_cache:
            refuse_a_cache_of_its_own(lm, whose, config.cache_implementation == "static")
    for name, why in REFUSED.items():
        given = getattr(config, name) if hasattr(config, name) else arguments.get(name)
        if not _asks_for_nothing(name, given):
            raise ValueError(f"`{name}={_short(given)}` does not go together with nudging: {why}.")
    mode = config.get_generation_mode(arguments.get("assistant_model"))
    if mode not in (
        GenerationMode.GREEDY_SEARCH,
        GenerationMode.SAMPLE,
    ):  # A later version of transformers may have others.
        raise ValueError(
            f"Nudging decodes greedily or by sampling, got {mode.value!r}: leave out what asks for another way."
        )
    if config.cache_implementation not in (None, "dynamic", "dynamic_full", "static"):
        raise ValueError(
            f"Nudging rolls its caches back row by row, which `cache_implementation={config.cache_implementation!r}` "
            "cannot do: leave it out, or take 'static', whose passes can be compiled."
        )
    if waits_for_other_ranks(model):
        raise ValueError(
            "The base is sharded by DeepSpeed ZeRO-3 or FSDP, whose ranks must make as many passes each, and rows go "
            "on at their own pace: gather its weights on each rank before it generates."
        )


def refuse_misshapen_prompts(input_ids: Any, attention_mask: Any, name: str) -> None:
    """Raises a `ValueError` for prompts, or a mask of them, that are no tensors of shape (batch_size, length).

    Args:
        input_ids, attention_mask: either may be `None`; a mask without ids is refused.
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


def refuse_streamer_of_several_rows(streamer: Any, rows: int) -> None:
    """Raises a `ValueError` if a streamer would be given the tokens of several answers."""
    if streamer is not None and rows > 1:
        raise ValueError(f"A streamer takes a single answer, got {rows} rows: generate them one at a time.")


def refuse_a_cache_of_its_own(model: Any, whose: str, is_static: bool = False) -> None:
    """Raises a `ValueError` if the rows of a model's cache cannot be rolled back.

    Args:
        is_static: whether the cache is to be of a fixed size.
    """
    if cache_argument(model) is None:
        return
    name = type(model).__name__
    if (trouble := reading_mode(model).trouble) is not None:
        raise ValueError(
            f"The cache of the {whose}, {name}, cannot be used, for {trouble}: give another model, or "
            "`use_cache=False`, with which each pass reads the whole text."
        )
    if is_static and (keeps_state(model) or reading_mode(model).rows is Rows.ALONE or not takes_static_cache(model)):
        raise ValueError(
            f"The {whose}, {name}, cannot be read over a cache of a fixed size: leave out "
            "`cache_implementation='static'`."
        )


def refuse_what_the_base_cannot_read(model: Any, more: list[str], use_cache: bool, is_static: bool) -> None:
    """Raises a `ValueError` if inputs besides ids, whose names are `more`, cannot be read in one first pass."""
    name, given = type(model).__name__, ", ".join(f"`{each}`" for each in more)
    if not reads_more_than_text(model):
        raise ValueError(f"The base, {name}, reads text alone, and nudging gives it nothing but ids: got {given}.")
    if overrides_generate(model):
        raise ValueError(
            f"The base, {name}, reads {given} by a `generate` of its own, which nudging does not go through: "
            "give its language model and text alone."
        )
    if not has_common_cache(model):
        raise ValueError(
            f"The base, {name}, keeps a cache of a kind of its own, and {given} would be read into it by padded rows: "
            "give its language model and text alone."
        )
    if not use_cache:
        raise ValueError(
            f"What goes beyond text is read once, into the cache: with {given} leave out `use_cache=False`."
        )
    if is_static:
        raise ValueError(
            f"What goes beyond text takes a cache that grows: with {given} leave out `cache_implementation='static'`."
        )


_BEAMS = "nudging decodes greedily or by sampling; leave it out"
_ASSISTED = "the nudging model's text is the draft; leave it out, and set `num_draft_tokens` for its length"
_NEGATIVE = "it belongs to `guidance_scale`; leave it out"

# Arguments of `generate` and fields of its config that are refused, each with the reason and what to give instead.
REFUSED = {
    "custom_generate": "it is a way of generating of its own; leave it out",
    **dict.fromkeys(CACHE_NAMES, "each row's cache is rolled back on its own; pass the whole text as `input_ids`"),
    "inputs_embeds": "the nudging model reads the prompt's text; pass `input_ids`",
    "position_ids": "positions are counted from `attention_mask`; leave them out",
    "negative_prompt_ids": _NEGATIVE,
    "negative_prompt_attention_mask": _NEGATIVE,
    "synced_gpus": "rows go on at their own pace; leave it out",
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
    "guidance_scale": "its processor keeps a cache of its own, which does not roll back; leave it out",
    "watermarking_config": "its processor counts on being called once a token, in order; leave it out",
    "token_healing": "it rewrites the base's prompt alone; leave it out",
    "forced_bos_token_id": "the nudging model writes the first word; write the token at the end of the prompt",
    "forced_eos_token_id": "only the nudging model ends an answer; use `max_new_tokens`",
    "prefill_chunk_size": "the prompt is read in the pass that verifies the first draft; leave it out",
    "output_attentions": "passes read several tokens at a time; leave it out",
    "output_hidden_states": "passes read several tokens at a time; leave it out",
}
# The number that stands for the default of such an argument, which asks for nothing.
_NOTHING = {"num_beams": 1, "num_beam_groups": 1, "diversity_penalty": 0, "penalty_alpha": 0, "guidance_scale": 1}


def _asks_for_nothing(name: str, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value is None or value is False
    return value == _NOTHING.get(name)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 40 else f"<{type(value).__name__}>"
