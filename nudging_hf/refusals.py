"""What nudging refuses, and what to give instead. It knows a call and what a model can do, never text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers.generation import GenerationMode

from .cache_layers import keeps_state
from .host import (
    CACHE_NAMES,
    cache_argument,
    overrides_generate,
    reads_more_than_text,
    takes_static_cache,
)
from .reading_mode import Rows, has_common_cache, reading_mode


def refuse_what_nudging_cannot_do(model: Any, nudging_model: Any, config: Any, arguments: Mapping[str, Any]) -> None:
    """Raises a `ValueError` that says what was given and what to give instead."""
    if nudging_model is None:
        raise ValueError(
            "There is no nudging model: give one as `nudging_model=`, or name one as `nudging_model_name_or_path` in "
            "the base's generation_config.json."
        )
    if not isinstance(nudging_model, torch.nn.Module) or not hasattr(nudging_model, "generation_config"):
        raise ValueError(
            f"`nudging_model` must be a causal language model of transformers, got {type(nudging_model).__name__}: "
            "load it with `AutoModelForCausalLM.from_pretrained`."
        )
    models: dict[str, Any] = {"base": model, "nudging model": nudging_model}
    for whose, lm in models.items():
        name = type(lm).__name__
        if lm.config.is_encoder_decoder:
            raise ValueError(f"The {whose} is an encoder-decoder model, {name}: give a decoder-only one.")
        if not reading_mode(lm).is_causal:
            raise ValueError(
                f"The {whose}, {name}, is no causal model that reads ids alone: what it says after a token depends on "
                "later ones, or on more. Give a decoder-only one; BERT's kind is one with `is_decoder=True` in its "
                "config."
            )
        if config.use_cache:
            refuse_a_cache_of_its_own(lm, whose, config.cache_implementation == "static")
    mode = config.get_generation_mode(arguments.get("assistant_model"))
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"Nudging decodes greedily or by sampling, got {mode.value!r}: leave out `num_beams`, `assistant_model`, "
            "`prompt_lookup_num_tokens`, `penalty_alpha` and `dola_layers`."
        )
    for name, why in _REFUSED.items():
        given = arguments.get(name, getattr(config, name, None))
        if given is not None and given is not False:
            raise ValueError(f"`{name}={_short(given)}` does not go together with nudging: {why}.")
    if config.guidance_scale not in (None, 1, 1.0):
        raise ValueError(f"`guidance_scale={config.guidance_scale}` does not go together with nudging: leave it out.")
    if config.cache_implementation not in (None, "dynamic", "dynamic_full", "static"):
        raise ValueError(
            f"Nudging rolls its caches back row by row, which `cache_implementation={config.cache_implementation!r}` "
            "cannot do: leave it out, or take 'static', whose passes can be compiled."
        )


def refuse_a_cache_of_its_own(model: Any, whose: str, is_static: bool = False) -> None:
    """Raises a `ValueError` where a model's cache is of a kind whose rows cannot be rolled back.

    Args:
        is_static: whether the cache is to be of a fixed size.
    """
    if cache_argument(model) is None:
        return
    name = type(model).__name__
    uncached = "give another model, or `use_cache=False`, with which each pass reads the whole text"
    if not has_common_cache(model):
        raise ValueError(
            f"The {whose}, {name}, keeps a cache of its own kind, which cannot be rolled back: {uncached}."
        )
    if (trouble := reading_mode(model).trouble) is not None:
        raise ValueError(f"The cache of the {whose}, {name}, cannot be used, for {trouble}: {uncached}.")
    if is_static and (keeps_state(model) or reading_mode(model).rows is Rows.ALONE or not takes_static_cache(model)):
        raise ValueError(
            f"The {whose}, {name}, cannot be read over a cache of a fixed size: leave out "
            "`cache_implementation='static'`."
        )


def refuse_what_the_base_cannot_read(model: Any, more: list[str], use_cache: bool, is_static: bool) -> None:
    """Raises a `ValueError` where inputs besides ids, of these names, cannot be read once and for all."""
    name, given = type(model).__name__, ", ".join(f"`{each}`" for each in more)
    if not reads_more_than_text(model):
        raise ValueError(f"The base, {name}, reads text alone, and nudging gives it nothing but ids: got {given}.")
    if overrides_generate(model):
        raise ValueError(
            f"The base, {name}, reads {given} by a `generate` of its own, which nudging does not go through: "
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


_REFUSED = {
    "custom_generate": "it is a way of generating of its own; leave it out",
    **dict.fromkeys(CACHE_NAMES, "each row's cache is rolled back on its own; pass the whole text as `input_ids`"),
    "inputs_embeds": "the nudging model reads the prompt's text; pass `input_ids`",
    "position_ids": "positions are counted from `attention_mask`; leave them out",
    "negative_prompt_ids": "it belongs to `guidance_scale`; leave it out",
    "synced_gpus": "rows go on at their own pace; leave it out",
    "watermarking_config": "its processor counts on being called once a token, in order; leave it out",
    "token_healing": "it rewrites the base's prompt alone; leave it out",
    "forced_eos_token_id": "only the nudging model ends an answer; use `max_new_tokens`",
    "prefill_chunk_size": "the prompt is read in the pass that verifies the first draft; leave it out",
    "output_attentions": "passes read several tokens at a time; leave it out",
    "output_hidden_states": "passes read several tokens at a time; leave it out",
}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 40 else f"<{type(value).__name__}>"
