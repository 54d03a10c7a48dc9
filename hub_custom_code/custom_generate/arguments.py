"""The keywords of `generate`, with their types, so that a type checker and an editor see a misspelt one.

`GenerateArguments` lists what nudging takes. What it refuses (`num_beams`, `assistant_model`, ...) is left out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

import torch
from transformers import GenerationConfig, PreTrainedModel

from .config import NudgingConfig


class NudgingArguments(TypedDict, total=False):
    """The models, tokenizers and prompts of nudging."""

    nudging_model: PreTrainedModel | str | os.PathLike[str] | None
    nudging_tokenizer: Any
    nudging_input_ids: torch.Tensor | None
    nudging_attention_mask: torch.Tensor | None
    nudging_config: NudgingConfig | Mapping[str, Any] | None
    base_tokenizer: Any


class NudgingParameters(TypedDict, total=False):
    """The fields of [`NudgingConfig`]."""

    nudge_threshold: float | str | None
    nudge_gate: str | None
    target_nudge_rate: float | None
    num_nudging_tokens: int | None
    takeover_on_agreement: bool | None
    word_boundary: str | None
    num_draft_tokens: int | str | None


class ModelInputs(TypedDict, total=False):
    """What the base reads. A processor's output may hold more: pass it as `**inputs`."""

    inputs: torch.Tensor | None
    input_ids: torch.Tensor | None
    attention_mask: torch.Tensor | None
    token_type_ids: torch.Tensor | None
    mm_token_type_ids: torch.Tensor | None
    pixel_values: Any
    pixel_values_videos: Any
    image_sizes: Any
    image_grid_thw: Any
    video_grid_thw: Any
    input_features: Any
    feature_attention_mask: Any


class GenerateArguments(NudgingArguments, NudgingParameters, ModelInputs, total=False):
    """All keywords of a nudged `generate`: nudging's own, the base's inputs, and what plain `generate` takes."""

    tokenizer: Any
    streamer: Any
    generation_config: GenerationConfig | None
    logits_processor: Sequence[Callable[..., torch.Tensor]] | None
    stopping_criteria: Sequence[Callable[..., Any]] | None
    prefix_allowed_tokens_fn: Callable[[int, torch.Tensor], list[int]] | None

    max_length: int | None
    max_new_tokens: int | None
    min_length: int | None
    min_new_tokens: int | None
    max_time: float | None
    stop_strings: str | list[str] | None
    eos_token_id: int | list[int] | torch.Tensor | None
    bos_token_id: int | None
    pad_token_id: int | None

    do_sample: bool | None
    num_return_sequences: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    top_h: float | None
    min_p: float | None
    typical_p: float | None
    epsilon_cutoff: float | None
    eta_cutoff: float | None
    renormalize_logits: bool | None
    remove_invalid_values: bool | None

    repetition_penalty: float | None
    encoder_repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    encoder_no_repeat_ngram_size: int | None
    bad_words_ids: list[list[int]] | None
    suppress_tokens: list[int] | None
    begin_suppress_tokens: list[int] | None
    sequence_bias: Any

    use_cache: bool | None
    cache_implementation: str | None
    max_cache_len: int | None
    compile_config: Any
    disable_compile: bool | None

    return_dict_in_generate: bool | None
    output_scores: bool | None
    output_logits: bool | None


OWN_ARGUMENTS = tuple(NudgingArguments.__annotations__)
