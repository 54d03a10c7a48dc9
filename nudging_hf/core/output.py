"""The output of a nudged `generate`. It knows finished rows, never how they were written."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from .cached_lm import CachedLM, SeparateRows
from .row import Row


@dataclass
class NudgingOutput(GenerateDecoderOnlyOutput):
    """The usual output of `generate`, and which model wrote which token.

    `scores` and `logits` are the base's at each new token, whichever model wrote it. `attentions`, `hidden_states` and
    the cache (`cache`, `past_key_values` before transformers 5.24) are `None`.

    Args:
        nudged_mask (`torch.BoolTensor` of shape `(batch_size, new_tokens)`):
            True where the nudging model wrote a new token. False on the end mark and on padding.
        base_top1_probs (`torch.FloatTensor` of shape `(batch_size, new_tokens)`):
            The base's top-1 probability at each new token; NaN on padding.
        base_tokens (`torch.LongTensor` of shape `(batch_size, new_tokens)`):
            What the base itself would have written in place of each new token: its most probable token after logits
            processors, or the one that it drew. It may be an EOS. Where the base wrote, it is the new token. It is
            padded as `sequences` are.
        base_token_probs (`torch.FloatTensor` of shape `(batch_size, new_tokens)`):
            The probability of each of `base_tokens`, by the raw logits; NaN on padding.
        base_ranks (`torch.LongTensor` of shape `(batch_size, new_tokens)`):
            The rank of each new token in the base's distribution: 1 for the most probable token; 0 on padding. At the
            first token of a nudging word it is the rank of Re-Align ([arXiv 2312.01552]).
        nudge_rate (`torch.FloatTensor` of shape `(batch_size,)`):
            The share of the answer's tokens that the nudging model wrote. The end mark does not count.
        finish_reasons (`list[str]`):
            Why each row ended: "eos" (the nudging model ended it), "length" (the call's limit, or the last position
            of either model), "time", "stop_string", "stop_token" (an `eos_token_id` of the call that is not the
            base's own), "stopping_criteria" (a criterion of the caller's own), or "stuck" (the base would end the
            answer, and can take nothing of what the nudging model would write, because the base's vocabulary has no
            tokens for it or the caller's processors forbid it).
        base_forward_passes, nudging_forward_passes (`int`):
            How many forward passes each model made, for all rows together.
        base_tokens_fed, nudging_tokens_fed (`int`):
            How many tokens each model read in these passes, including prompts and excluding padding.
    """

    nudged_mask: torch.Tensor | None = None
    base_top1_probs: torch.Tensor | None = None
    base_tokens: torch.Tensor | None = None
    base_token_probs: torch.Tensor | None = None
    base_ranks: torch.Tensor | None = None
    nudge_rate: torch.Tensor | None = None
    finish_reasons: list[str | None] | None = None
    base_forward_passes: int | None = None
    nudging_forward_passes: int | None = None
    base_tokens_fed: int | None = None
    nudging_tokens_fed: int | None = None


def padded_sequences(input_ids: torch.Tensor, rows: Sequence[Row], pad_token_id: int | None) -> torch.Tensor:
    """Prompts and answers of shape (batch_size, prompt_length + new_tokens). Answers are padded on the right."""
    return torch.cat([input_ids, _padded_ids([row.answer.ids for row in rows], pad_token_id, input_ids)], dim=1)


def nudging_output(
    sequences: torch.Tensor,
    rows: Sequence[Row],
    base: CachedLM | SeparateRows,
    nudging: CachedLM | SeparateRows,
    scores: bool,
    logits: bool,
    pad_token_id: int | None,
) -> NudgingOutput:
    """Makes the full output of finished rows, with `scores` and `logits` if they are wanted and were recorded."""
    # The base has predicted every token of a finished answer, and what was drafted after it.
    said = [[row.predictions[place] for place in range(len(row.answer.ids))] for row in rows]
    device = sequences.device
    rates = [sum(row.nudged) / max(1, len(row.answer.ids) - row.end_marks) for row in rows]
    return NudgingOutput(
        sequences=sequences,
        scores=_stack_steps([[each.scores for each in row] for row in said]) if scores else None,
        logits=_stack_steps([[each.logits for each in row] for row in said]) if logits else None,
        nudged_mask=_padded([row.nudged for row in rows], False, torch.bool, device),
        base_top1_probs=_padded([[each.top1 for each in row] for row in said], math.nan, torch.float32, device),
        base_tokens=_padded_ids([[each.token for each in row] for row in said], pad_token_id, sequences),
        base_token_probs=_padded(
            [[each.probability for each in row] for row in said], math.nan, torch.float32, device
        ),
        base_ranks=_padded([[each.rank for each in row] for row in said], 0, torch.long, device),
        nudge_rate=torch.tensor(rates, device=device),
        finish_reasons=[row.finish_reason for row in rows],
        base_forward_passes=base.forward_passes,
        nudging_forward_passes=nudging.forward_passes,
        base_tokens_fed=base.tokens_fed,
        nudging_tokens_fed=nudging.tokens_fed,
    )


def _padded(rows: Sequence[Sequence[Any]], padding: float, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The rows, padded on the right, of shape (batch_size, new_tokens)."""
    width = max(map(len, rows))
    filled = [[*row, *[padding] * (width - len(row))] for row in rows]
    return torch.tensor(filled, dtype=dtype, device=device)


def _padded_ids(rows: Sequence[Sequence[int]], pad_token_id: int | None, like: torch.Tensor) -> torch.Tensor:
    """Rows of ids, padded on the right. `pad_token_id` may be `None` if no row needs padding."""
    return _padded(rows, pad_token_id or 0, like.dtype, like.device)


def _stack_steps(rows: list[list[Any]]) -> tuple[torch.Tensor, ...]:
    """Stacks the rows to one tensor of shape (batch_size, vocab_size) for each new token; 0 after a row's end."""
    width = max(map(len, rows))
    nothing: Any = next((torch.zeros_like(step) for row in rows for step in row), None)
    return tuple(torch.stack([row[i] if i < len(row) else nothing for row in rows]).float() for i in range(width))
