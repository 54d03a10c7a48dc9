"""Turns logits into tokens: logits processors, then argmax or a random draw. It knows scores and ids, never text.

A draw is a function of a key and the scores: the same key and scores give the same token. A key is made from the row's
seed and the token's place, so a position draws the same token early or late, alone or in a batch.
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

# These processors ignore the ids, so that they can process many positions at once.
_SCORE_ONLY_PROCESSORS = (
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
    """The last positions of one row, at which tokens are chosen.

    Args:
        processors: the row's logits processors.
        prompt: ids of shape (1, prompt_length).
        answer: the ids after the prompt. They are read only if the row has processors.
        number: how many positions there are. The last one follows the whole answer, and each position before it
            follows one id fewer.
    """

    processors: LogitsProcessorList
    prompt: torch.Tensor
    answer: Iterable[int]
    number: int


def processed_scores(logits: torch.Tensor, rows: Sequence[Positions]) -> torch.Tensor:
    """Applies each row's logits processors at its last positions, as `generate` would at one position at a time.

    Args:
        logits: float32 of shape (positions of all rows, vocab_size). They are not changed.
        rows: each row's positions, in the order in which they stand in `logits`.

    Returns:
        float32 scores of the same shape. They are the logits themselves if no row has a processor.
    """
    if not any(row.processors for row in rows):
        return logits
    own = logits.split([row.number for row in rows])
    return joined([_process_row(row, row_logits) for row, row_logits in zip(rows, own, strict=True)])


def _process_row(row: Positions, logits: torch.Tensor) -> torch.Tensor:
    if not row.processors:
        return logits
    scores = logits.clone()
    answer = torch.tensor([[*row.answer]], dtype=row.prompt.dtype, device=row.prompt.device)
    ids = torch.cat([row.prompt, answer], dim=1)
    before = ids.shape[1] - row.number + 1
    for processor in row.processors:
        if isinstance(processor, _SCORE_ONLY_PROCESSORS):
            scores = processor(ids, scores)
        else:
            scores = joined([processor(ids[:, : before + i], scores[i : i + 1]) for i in range(row.number)])
    return scores


def joined(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Concatenates tensors along their first dimension. A single tensor is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def choose(scores: torch.Tensor, keys: Sequence[int | None]) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses a token at each position.

    Args:
        scores: processed scores of shape (positions, vocab_size).
        keys: for each position, a key to draw by. With `None` the token with the greatest score is chosen.

    Returns:
        Tokens of shape (positions,), int64, and the greatest score at each position, which is NaN or infinite where
        no token can be chosen. Both are on the device of the scores.
    """
    if all(key is None for key in keys):
        tokens = scores.argmax(dim=-1)  # It treats NaN as the greatest score.
        return tokens, scores.gather(-1, tokens[:, None])[:, 0]
    # The exponential race, as in `torch.multinomial`: p / Exp(1) is greatest at each token with that token's
    # probability. The key seeds the noise.
    generator = torch.Generator(scores.device)
    noise = torch.ones_like(scores)
    for i, key in enumerate(keys):
        if key is not None:
            noise[i].exponential_(generator=generator.manual_seed(key))
    tokens = (scores.softmax(dim=-1) / noise).argmax(dim=-1)
    if None in keys:
        is_greedy = torch.tensor([key is None for key in keys], device=scores.device)
        tokens = torch.where(is_greedy, scores.argmax(dim=-1), tokens)
    return tokens, scores.amax(dim=-1)


def fold_in(key: int, value: int) -> int:
    """Derives a key from a key and a value: 63 bits, mixed by the finalizer of splitmix64 (Steele et al. 2014)."""
    mask = (1 << 64) - 1
    x = (key * 0x9E3779B97F4A7C15 + value + 0x632BE59BD9B4E019) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return (x ^ (x >> 31)) >> 1


def new_seeds(rows: int) -> list[int]:
    """Draws a seed for each row from torch's global generator, so `torch.manual_seed` makes an answer repeatable."""
    return torch.randint(2**62, (rows,)).tolist()
