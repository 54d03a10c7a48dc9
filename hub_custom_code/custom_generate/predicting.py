"""Turns the base's logits into predictions: its next token and how sure it is. It runs no model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

import torch

from .gate import Gate
from .row import Prediction, Row
from .sampling import Positions, choose, fold_in, processed_scores

_BASE_STREAM = 0  # The base's draws use keys of their own.


class Reading(NamedTuple):
    """What the base has read of one row, for which predictions are wanted.

    Args:
        row: the answer.
        ids: of the answer and the draft after it.
        number: how many predictions there are. The last one follows all ids, and each one before it one id fewer.
    """

    row: Row
    ids: Sequence[int]
    number: int


def predictions(logits: torch.Tensor, readings: Sequence[Reading]) -> list[list[Prediction]]:
    """What the base says at the wanted positions of each row.

    Args:
        logits: raw logits, float32 of shape (positions of all rows, vocab_size), where the rows' prompts are.
        readings: the rows in the order in which their positions stand in `logits`.
    """
    scores = processed_scores(
        logits, [Positions(row.base.processors, row.base.prompt, ids, number) for row, ids, number in readings]
    )
    tokens, best = choose(scores, [key for reading in readings for key in _keys(reading)])
    probabilities = logits.softmax(dim=-1)
    said = numbers(
        tokens,
        _gate_scores(probabilities, tokens, readings),
        probabilities.amax(dim=-1),
        best,
        probabilities.gather(-1, tokens[:, None])[:, 0],
    )
    each = zip(*said, logits, scores, strict=True)
    return [
        [
            Prediction(
                int(token),
                score,
                top1,
                best_score,
                probability,
                own if row.request.records else None,
                own_scores if row.request.records_logits else None,
            )
            for token, score, top1, best_score, probability, own, own_scores in islice(each, number)
        ]
        for row, _, number in readings
    ]


def rank_accepted(rows: Iterable[Row]) -> None:
    """Ranks the tokens that the answers have accepted among all that the base could have said, in one go.

    The rank of a token is 1 more than the number of tokens whose raw logit is greater (Lin et al., "The Unlocking
    Spell on Base LLMs", arXiv 2312.01552). Logits that are not recorded for the caller are dropped then.
    """
    due = [
        (row, place, logits)
        for row in rows
        if row.request.records
        for place in row.predictions.unranked(len(row.answer.ids))
        if (logits := row.predictions[place].logits) is not None
    ]
    if not due:
        return
    logits = torch.stack([logits for _, _, logits in due])
    tokens = torch.tensor([[row.answer.ids[place]] for row, place, _ in due], device=logits.device)
    ranks = 1 + (logits > logits.gather(-1, tokens)).sum(dim=-1)
    for (row, place, _), rank in zip(due, ranks.tolist(), strict=True):
        row.predictions.set_rank(place, rank)
        if not row.request.records_logits:
            row.predictions.forget_logits(place)


def _keys(reading: Reading) -> Iterable[int | None]:
    row, ids, number = reading
    if not row.request.rules.base_samples:
        return [None] * number
    stream = fold_in(row.seed, _BASE_STREAM)
    return (fold_in(stream, place) for place in range(len(ids) + 1 - number, len(ids) + 1))


def _gate_scores(probabilities: torch.Tensor, tokens: torch.Tensor, readings: Sequence[Reading]) -> torch.Tensor:
    """The score of each row's gate at each position, of shape (positions,)."""
    gates: dict[Gate, None] = dict.fromkeys(row.confidence.gate for row, _, _ in readings)
    scores = [gate.scores(probabilities, tokens) for gate in gates]
    if len(scores) == 1:
        return scores[0]
    places = {gate: place for place, gate in enumerate(gates)}
    which = [places[row.confidence.gate] for row, _, number in readings for _ in range(number)]
    return torch.stack(scores).gather(0, torch.tensor([which], device=tokens.device))[0]


def numbers(*tensors: torch.Tensor) -> list[list[float]]:
    """The numbers of tensors of one shape, in one transfer from their device.

    They pass as float32, which holds whole numbers up to 2**24, more than any vocabulary has.
    """
    if tensors[0].device.type == "cpu":  # There is nothing to wait for.
        return [each.tolist() for each in tensors]
    return torch.stack([each.float() for each in tensors]).tolist()
