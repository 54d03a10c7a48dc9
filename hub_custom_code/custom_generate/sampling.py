"""From logits to tokens: logits processors, then the greatest score or a draw. It knows scores and ids, never text.

A draw is a function of a key and the scores: the same key and scores give the same token. Keys are made of the row's
seed and of where the token stands, so a position asked for early, late, alone or in a batch draws the same token.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from transformers import LogitsProcessorList
from transformers.generation import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

# Processors that look at the scores alone: many positions can go through them at once.
_BLIND_TO_IDS = (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    MinPLogitsWarper,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)


class Positions(NamedTuple):
    """The last positions of one row.

    Args:
        processors: of the row.
        prompt: ids of shape (1, prompt_length).
        answer: the ids behind it; read only where the row has processors.
        number: of the positions; the last stands after the whole answer, those before after one id fewer each.
    """

    processors: LogitsProcessorList
    prompt: torch.Tensor
    answer: Iterable[int]
    number: int


def processed_scores(logits: torch.Tensor, rows: Sequence[Positions]) -> torch.Tensor:
    """The scores at the last positions of rows, as `generate` would process them one at a time.

    Args:
        logits: float32 of shape (positions of all rows, vocab_size). They are not changed.

    Returns:
        float32 scores of the same shape; the logits themselves where no row has a processor.
    """
    if not any(row.processors for row in rows):
        return logits
    own = logits.split([row.number for row in rows])
    return joined([_processed(row, row_logits) for row, row_logits in zip(rows, own, strict=True)])


def _processed(row: Positions, logits: torch.Tensor) -> torch.Tensor:
    if not row.processors:
        return logits
    scores = logits.clone()
    answer = torch.tensor([[*row.answer]], dtype=row.prompt.dtype, device=row.prompt.device)
    ids = torch.cat([row.prompt, answer], dim=1)
    before = ids.shape[1] - row.number + 1
    for processor in row.processors:
        if isinstance(processor, _BLIND_TO_IDS):
            scores = processor(ids, scores)
        else:
            scores = joined([processor(ids[:, : before + i], scores[i : i + 1]) for i in range(row.number)])
    return scores


def joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    """One behind the other; a single one is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def choose(scores: torch.Tensor, keys: Sequence[int] | None) -> torch.Tensor:
    """A token at each position.

    Args:
        scores: of shape (positions, vocab_size).
        keys: one a position, to draw by; `None` takes the greatest score.

    Returns:
        Tokens of shape (positions,), int64, on the device of the scores.
    """
    if keys is None:
        return scores.argmax(dim=-1)
    # The greatest of p / Exp(1) falls on each token with its probability: the exponential race, as in
    # `torch.multinomial`, with noise that belongs to the key.
    generator = torch.Generator(scores.device)
    noise = torch.empty_like(scores)
    for i, key in enumerate(keys):
        noise[i].exponential_(generator=generator.manual_seed(key))
    return (scores.softmax(dim=-1) / noise).argmax(dim=-1)


def best_scores(scores: torch.Tensor, tokens: torch.Tensor, is_greedy: bool) -> torch.Tensor:
    """The greatest score at each position: NaN or infinite where no token can be chosen there.

    Args:
        scores: of shape (positions, vocab_size).
        tokens: those that were chosen, of shape (positions,); `argmax` takes NaN for the greatest.

    Returns:
        Scores of shape (positions,).
    """
    return scores.gather(-1, tokens[:, None])[:, 0] if is_greedy else scores.amax(dim=-1)


def fold_in(key: int, value: int) -> int:
    """A key made of a key and a value, 63 bits well mixed (the finalizer of splitmix64, Steele et al. 2014)."""
    mask = (1 << 64) - 1
    x = (key * 0x9E3779B97F4A7C15 + value + 0x632BE59BD9B4E019) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return (x ^ (x >> 31)) >> 1


def new_seeds(rows: int) -> list[int]:
    """A seed for each row, from torch's global generator: `torch.manual_seed` makes a sampled answer repeatable."""
    return torch.randint(2**62, (rows,)).tolist()
