"""From logits to tokens: logits processors, then the greatest score or a draw. It knows scores and ids, never text.

A draw is a function of a key and the scores: the same key and scores give the same token. Keys are made of the row's
seed and of where the token stands, so a position asked for early, late, alone or in a batch draws the same token.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def processed_scores(
    processors: LogitsProcessorList, prompt: torch.Tensor, answer: Sequence[int], logits: torch.Tensor
) -> torch.Tensor:
    """The scores at the last positions of one row, as `generate` would process them one at a time.

    Args:
        prompt: ids of shape (1, prompt_length).
        answer: the ids behind it.
        logits: raw logits of shape (positions, vocab_size); the last stand after the whole answer, those before after
            one id fewer each. They are not changed.

    Returns:
        float32 scores of shape (positions, vocab_size).
    """
    if not processors:
        return logits.float()
    scores = logits.to(torch.float32, copy=True)
    ids = torch.cat([prompt, torch.tensor([answer], dtype=prompt.dtype, device=prompt.device)], dim=1)
    before = ids.shape[1] - scores.shape[0] + 1
    for processor in processors:
        if isinstance(processor, _BLIND_TO_IDS):
            scores = processor(ids, scores)
        else:
            positions = [processor(ids[:, : before + i], scores[i : i + 1]) for i in range(scores.shape[0])]
            scores = torch.cat(positions)
    return scores


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


def mix(key: int, value: int) -> int:
    """A key made of a key and a value, 63 bits well mixed (the finalizer of splitmix64, Steele et al. 2014)."""
    mask = (1 << 64) - 1
    x = (key * 0x9E3779B97F4A7C15 + value + 0x632BE59BD9B4E019) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return (x ^ (x >> 31)) >> 1


def new_seeds(rows: int) -> list[int]:
    """A seed for each row, from torch's global generator: `torch.manual_seed` makes a sampled answer repeatable."""
    return torch.randint(2**62, (rows,)).tolist()
