"""Lets the nudging model write ahead in many rows by one forward pass. It knows ids and scores, never the algorithm.

The nudging model reads its own text *and* a guess of what it will write, keeps what was guessed right, and writes one
more token.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from itertools import accumulate, chain, islice

import torch
from transformers import LogitsProcessorList
from transformers.utils import logging

from .cached_lm import CachedLM, Reading, SeparateRows
from .drafting import Drafter
from .gate import top1_probabilities
from .predicting import numbers
from .prompt_lookup import guess
from .row import Row, WritingEnd
from .sampling import Positions, choose, fold_in, joined, processed_scores

logger = logging.get_logger(__name__)


def write(nudging: CachedLM | SeparateRows, rows: Sequence[Row], drafter: Drafter, is_forced: bool) -> None:
    """Lets the nudging model write a token in each row, and before it whatever was guessed right.

    Args:
        nudging: the nudging model.
        rows: the answers, of which what was written ahead is aligned to the answer.
        drafter: says how many tokens are guessed, and learns from the outcome and from the time.
        is_forced: whether some row must write, so that the others draft for free.
    """
    began = time.perf_counter()
    guess_length = drafter.guess_length(len(rows))
    # While a token count forbids it to end the answer, it writes one token at a time.
    may_end = [not _may_not_end(row) for row in rows]
    guesses, readings = [], {}
    for row, ends in zip(rows, may_end, strict=True):
        text = [*row.answer.nudging_prompt, *row.ahead.all_ids]
        guesses.append(_guess(row, text, guess_length) if ends else [])
        if not ends and row.ahead.held_back_at is None:
            row.ahead.held_back_at = row.untold_tokens
        readings[row.number] = _reading(row, text, guesses[-1])
    logits = nudging.read(readings)
    raw = joined([logits[row.number] for row in rows]).float()
    scores = _scores(rows, guesses, may_end, raw)
    tokens, best = choose(
        scores, [key for row, guessed in zip(rows, guesses, strict=True) for key in _keys(row, guessed)]
    )
    said = zip(*numbers(tokens, top1_probabilities(raw), best), strict=True)
    outcomes, least_top1 = [], []
    for row, guessed in zip(rows, guesses, strict=True):
        own_said = list(islice(said, len(guessed) + 1))
        accepted = _accept_guesses(row, guessed, own_said)
        outcomes.append((accepted, len(guessed)))
        least_top1.append(min(top1 for _, top1, _ in own_said[: accepted + 1]))
    drafter.wrote(outcomes, least_top1, has_ended=any(row.ahead.end is not None for row in rows))
    written = sum(accepted + 1 for accepted, _ in outcomes) / len(rows)
    drafter.time_step(nudging.last_shape, time.perf_counter() - began, written, is_forced)


def _may_not_end(row: Row) -> bool:
    fewest = row.request.rules.min_new_tokens
    return len(row.answer.ids) < fewest and row.answer.count(row.ahead.ids) < fewest


def _keys(row: Row, guessed: list[int]) -> Sequence[int | None]:
    if not row.request.rules.nudging_samples:
        return [None] * (len(guessed) + 1)
    return list(accumulate(guessed, fold_in, initial=row.ahead.key()))


def _reading(row: Row, text: list[int], guessed: list[int]) -> Reading:
    positions = row.request.rules.nudging_positions
    if len(text) > positions:
        logger.warning_once(
            "The nudging model reads more tokens than it was trained on, by its `max_position_embeddings` of "
            f"{int(positions)}: its words may be worse from there on."
        )
    return Reading(text + guessed, len(guessed) + 1, settled=len(row.answer.nudging_prompt) + row.ahead.context)


def _guess(row: Row, text: list[int], most: int) -> list[int]:
    """A guess of what the nudging model writes next, within its room and the caller's constraints."""
    ahead, rules = row.ahead, row.request.rules
    most = int(min(most, row.nudging.room - len(ahead.all_ids) - 1))
    guessed = guess(text, ahead.abandoned, ahead.tokens_since, most)
    if guessed and row.constraint is not None and rules.one_vocabulary:
        ends = next((n for n, token in enumerate(guessed) if token in rules.nudging_eos), len(guessed))
        return guessed[: row.constraint.allowed_prefix([*row.answer.ids, *ahead.ids], guessed[:ends])]
    return guessed


def _scores(rows: Sequence[Row], guesses: list[list[int]], may_end: list[bool], raw: torch.Tensor) -> torch.Tensor:
    """The nudging model's processed scores at all positions, of shape (positions of all rows, vocab_size)."""
    scores = processed_scores(
        raw,
        [
            Positions(
                row.nudging.processors
                if ends
                else LogitsProcessorList([*row.nudging.processors, row.request.rules.no_end]),
                row.nudging.prompt,
                chain(row.ahead.all_ids, guessed),
                len(guessed) + 1,
            )
            for row, guessed, ends in zip(rows, guesses, may_end, strict=True)
        ],
    )
    scores = scores + rows[0].request.rules.never_drawn(scores)  # It depends on the pair alone.
    if not (rows[0].request.rules.one_vocabulary and any(row.constraint is not None for row in rows)):
        return scores
    masks = []
    for row, guessed in zip(rows, guesses, strict=True):
        if row.constraint is None:
            masks.append(scores.new_zeros(len(guessed) + 1, scores.shape[-1]))
            continue
        rules, ids = row.request.rules, [*row.answer.ids, *row.ahead.ids, *guessed]
        begin = len(ids) - len(guessed)
        masks += [rules.forbidden(row.constraint, ids[:stop], scores)[None] for stop in range(begin, len(ids) + 1)]
    return scores + torch.cat(masks)


def _accept_guesses(row: Row, guessed: list[int], said: list[tuple[float, float, float]]) -> int:
    """Keeps the confirmed guesses and one new token, and returns how many guesses were confirmed."""
    ahead, rules = row.ahead, row.request.rules
    is_bound = rules.one_vocabulary and row.constraint is not None
    for accepted, (number, top1, best) in enumerate(said):
        token = int(number)
        if not math.isfinite(top1):
            ahead.finish(WritingEnd.LOGITS, top1)
        elif not math.isfinite(best):
            blocked = best == -math.inf and is_bound
            ahead.finish(WritingEnd.BLOCKED if blocked else WritingEnd.SCORES, top1, best=best)
        elif token in rules.nudging_eos:
            ahead.finish(WritingEnd.EOS, top1, eos=token)
        else:
            ahead.write(token, top1)
            if is_bound and token in rules.stop_tokens:
                ahead.finish(WritingEnd.BLOCKED)  # Processors are not asked what may stand after a stop token.
        if accepted == len(guessed) or ahead.end is not None or token != guessed[accepted]:
            break
    return accepted
