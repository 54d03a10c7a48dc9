"""What nudging uses of transformers that is not public, in one place. Tried on transformers 5.23.0."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)


def merged_generation_config(
    model: Any, generation_config: GenerationConfig | None = None, **kwargs: Any
) -> GenerationConfig:
    """The config that `model.generate(generation_config=generation_config, **kwargs)` would go by."""
    return model._prepare_generation_config(generation_config, **kwargs)[0]


def own_generation_config(model: Any, do_sample: bool) -> GenerationConfig:
    """The config by which a model writes on its own, special tokens prepared, lengths left to the caller.

    Args:
        do_sample: `False` makes it greedy; `True` leaves it as the model's own config says.
    """
    config = merged_generation_config(model)
    config.do_sample = bool(config.do_sample and do_sample)
    config.min_length = config.min_new_tokens = config.forced_eos_token_id = None
    model._prepare_special_tokens(config, device=model.device)
    return config


# Where a patched `generate` keeps the one that it replaced.
ORIGINAL = "_nudging_hf_original"


def plain_generate(model: Any) -> Callable[..., Any]:
    """The `generate` of the model's class, as it is without nudging."""
    own = type(model).generate
    return getattr(own, ORIGINAL, own)


def is_prepared(generation_config: GenerationConfig | None) -> bool:
    """Whether `generate` has prepared the config, i.e. is calling a `custom_generate` function."""
    return hasattr(generation_config, "_pad_token_tensor")


def eos_token_ids(generation_config: GenerationConfig) -> list[int]:
    """The EOS ids of a prepared config, in its order."""
    eos = generation_config._eos_token_tensor
    return [] if eos is None else eos.tolist()


def pad_token_id(generation_config: GenerationConfig) -> int | None:
    """The padding id of a prepared config; `generate` takes the first EOS where none is set."""
    pad = generation_config._pad_token_tensor
    return None if pad is None else int(pad)


def own_processors(model: Any, generation_config: GenerationConfig, input_ids: torch.Tensor) -> LogitsProcessorList:
    """The logits processors that a prepared config asks for, behind a prompt of shape (1, prompt_length)."""
    return model._get_logits_processor(
        generation_config=generation_config,
        input_ids_seq_length=input_ids.shape[1],
        encoder_input_ids=input_ids,
        device=input_ids.device,
        model_kwargs={"attention_mask": torch.ones_like(input_ids)},
    )


def processors_of_row(prepared: LogitsProcessorList, row: int, rows: int) -> LogitsProcessorList:
    """The processors that `generate` prepared for a batch, bound to one row, to be called with that row alone."""
    own = LogitsProcessorList()
    for processor in prepared:
        bound = copy.copy(processor)
        if isinstance(bound, PrefixConstrainedLogitsProcessor):
            allowed = bound._prefix_allowed_tokens_fn
            bound._prefix_allowed_tokens_fn = lambda _, ids, allowed=allowed: allowed(row, ids)
        elif isinstance(bound, RepetitionPenaltyLogitsProcessor):
            if isinstance(bound.prompt_ignore_length, torch.Tensor):
                bound.prompt_ignore_length = bound.prompt_ignore_length[row : row + 1]
        elif isinstance(bound, EncoderRepetitionPenaltyLogitsProcessor):
            prompt = row * bound.encoder_input_ids.shape[0] // rows
            bound.encoder_input_ids = bound.encoder_input_ids[prompt : prompt + 1]
        elif isinstance(bound, EncoderNoRepeatNGramLogitsProcessor):
            bound.generated_ngrams = bound.generated_ngrams[row * bound.batch_size // rows :]
            bound.batch_size = 1
        else:  # Knows nothing of the batch, or is the caller's own, and the same for all rows.
            bound = processor
        own.append(bound)
    return own


def keeps_recurrent_state(model: Any) -> bool:
    """Whether the model keeps a state (Mamba, linear attention) from which no token can be taken back."""
    return bool(model._is_stateful)
