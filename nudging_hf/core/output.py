"""The output of a nudged `generate`. It knows finished rows, never how they were written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.generation import GenerateDecoderOnlyOutput

from .cached_lm import CachedLM, SeparateRows
from .row import Prediction, Row


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
    nudge_rate: torch.Tensor | None = None
    finish_reasons: list[str | None] | None = None
    base_forward_passes: int | None = None
    nudging_forward_passes: int | None = None
    base_tokens_fed: int | None = None
    nudging_tokens_fed: int | None = None


def padded_sequences(input_ids: torch.Tensor, rows: Sequence[Row], pad_token_id: int | None) -> torch.Tensor:
    """Prompts and answers of shape (batch_size, prompt_length + new_tokens). Answers are padded on the right."""
    width = max(len(row.answer.ids) for row in rows)
    # `pad_token_id` may be `None` if no row needs padding.
    padding = [[pad_token_id or 0] * (width - len(row.answer.ids)) for row in rows]
    new = [[*row.answer.ids, *pads] for row, pads in zip(rows, padding, strict=True)]
    return torch.cat([input_ids, torch.tensor(new, dtype=input_ids.dtype, device=input_ids.device)], dim=1)


def nudging_output(
    sequences: torch.Tensor,
    rows: Sequence[Row],
    base: CachedLM | SeparateRows,
    nudging: CachedLM | SeparateRows,
    scores: bool,
    logits: bool,
) -> NudgingOutput:
    """Makes the full output of finished rows, with `scores` and `logits` if they are wanted and were recorded."""
    width = max(len(row.answer.ids) for row in rows)
    device = sequences.device
    mask = torch.zeros(len(rows), width, dtype=torch.bool, device=device)
    top1 = torch.full((len(rows), width), float("nan"), device=device)
    rates = []
    for i, row in enumerate(rows):
        n = len(row.answer.ids)
        mask[i, :n] = torch.tensor(row.nudged, dtype=torch.bool)
        top1[i, :n] = torch.tensor([prediction.top1 for prediction in _predictions(row)])
        rates.append(sum(row.nudged) / max(1, n - row.end_marks))
    return NudgingOutput(
        sequences=sequences,
        scores=_stack_steps([[each.scores for each in _predictions(row)] for row in rows], width) if scores else None,
        logits=_stack_steps([[each.logits for each in _predictions(row)] for row in rows], width) if logits else None,
        nudged_mask=mask,
        base_top1_probs=top1,
        nudge_rate=torch.tensor(rates, device=device),
        finish_reasons=[row.finish_reason for row in rows],
        base_forward_passes=base.forward_passes,
        nudging_forward_passes=nudging.forward_passes,
        base_tokens_fed=base.tokens_fed,
        nudging_tokens_fed=nudging.tokens_fed,
    )


def _predictions(row: Row) -> list[Prediction]:
    """The base's predictions at the tokens of a finished answer."""
    return [row.predictions[place] for place in range(len(row.answer.ids))]


def _stack_steps(rows: list[list[Any]], width: int) -> tuple[torch.Tensor, ...]:
    """Stacks the rows to one tensor of shape (batch_size, vocab_size) for each new token; 0 after a row's end."""
    nothing: Any = next((torch.zeros_like(step) for row in rows for step in row), None)
    return tuple(torch.stack([row[i] if i < len(row) else nothing for row in rows]).float() for i in range(width))
