"""Runs the algorithm of each row as far as what both models have said carries. It makes no forward pass.

The algorithm asks questions, and a row holds what is known: what the base has predicted and what the nudging model has
written ahead. An executor makes forward passes, records their outcome in the rows, and calls `advance`.
"""

from __future__ import annotations

import math

import torch

from .answer import OneVocabulary, TwoVocabularies
from .draft_policy import DraftProgress
from .rounds import Accept, Lookahead, Question, Reply, Step, Verdict
from .row import Row, WritingEnd
from .vocabulary import to_text

_MAX_CHARACTER_BYTES = 4  # In UTF-8.
_MIN_LOOKAHEAD_BOUND = 32  # A lookahead may have this many tokens however few the answer can still take.


def begin(row: Row) -> None:
    """Asks the algorithm its first question."""
    _resume(row, None)


def advance(row: Row) -> None:
    """Answers the row's questions until one must wait for a forward pass, or the answer ends.

    Raises:
        ValueError: if logits are NaN or infinite, or if logits processors leave no token to choose.
    """
    while row.is_open:
        if row.question is Question.LOOKAHEAD:
            row.realign()
            reply: Lookahead | Verdict | None = _lookahead(row)
        else:
            if row.confidence.gate.against_nudging_model:
                row.realign()
            reply = _verdict(row)
        if reply is None:
            return row.realign()
        _resume(row, reply)


def end(row: Row, reason: str) -> None:
    """Ends the answer."""
    row.finish_reason = reason
    row.algorithm.close()


def must_write(row: Row) -> bool:
    """Whether the row's question cannot be answered before the nudging model has written."""
    if row.question is Question.LOOKAHEAD:
        return True  # A lookahead that is known has been answered already.
    return row.confidence.gate.against_nudging_model and row.ahead.first_top1 is None


def must_read(row: Row) -> bool:
    """Whether the row's question cannot be answered before the base has read the answer."""
    return row.question is Question.VERDICT and len(row.predictions) <= len(row.answer.ids)


def draft_progress(row: Row) -> DraftProgress:
    """What the nudging model has written of the row's draft, and how long the draft can become."""
    written = row.ahead.top1_probs
    # Before `min_new_tokens` a draft holds for one count of tokens, which a text does not tell in two vocabularies.
    holds = isinstance(row.answer, OneVocabulary) or len(row.answer.ids) >= row.request.rules.min_new_tokens
    may_write_on = holds and row.ahead.end is None and len(row.ahead.all_ids) < row.nudging.room
    return DraftProgress(written, _max_draft(row) if may_write_on else len(written))


def _max_draft(row: Row) -> float:
    """How many draft tokens the base can read after the answer, within its limits."""
    return max(0.0, row.room - 1)


def draft(row: Row, length: int) -> list[int]:
    """What the nudging model has written after the answer, as up to so many tokens that the base may read."""
    answer, rules = row.answer, row.request.rules
    ids = answer.draft(row.ahead.ids[:length], int(min(length, _max_draft(row))))
    if not rules.one_vocabulary:
        ids = ids[: rules.num_allowed(row.constraint, answer.ids, ids)]
    return ids


def _resume(row: Row, reply: Reply) -> None:
    """Answers the row's question and accepts what follows, up to the next question or the end."""
    rules = row.request.rules
    step = _next_step(row, reply)
    while isinstance(step, Accept):
        for token in step.ids:
            _append(row, token, step.nudged)
            if reason := row.limit_reached():
                return end(row, reason)
        step = _next_step(row, None)
    if isinstance(step, Question):
        row.question = step
        if step is Question.LOOKAHEAD and row.ahead.held_back_at not in (None, row.untold_tokens):
            row.ahead.forget()  # Its end was held back by another count of tokens.
        return
    if step == "eos" and rules.one_vocabulary and row.ahead.eos in rules.stop_tokens:
        assert row.ahead.eos is not None
        _append(row, row.ahead.eos, nudged=True)  # The nudging model wrote the caller's stop token.
        step = "stop_token"
    elif step == "eos" and rules.base_eos:
        _append(row, rules.base_eos[0], nudged=False)  # The end mark is nobody's word.
        row.end_marks = 1
    end(row, step)


def _next_step(row: Row, reply: Reply) -> Step | str:
    """The algorithm's next step, or why the answer has ended.

    The call stands alone in its `try`, because a `StopIteration` of a caller's criterion or streamer ends no answer.
    """
    try:
        return row.algorithm.send(reply)
    except StopIteration as stop:
        return stop.value


def _append(row: Row, token: int, nudged: bool) -> None:
    row.append(token, nudged)
    streamer = row.request.streamer
    if hasattr(streamer, "put_marked"):
        streamer.put_marked(torch.tensor([token]), nudged)
    elif streamer is not None:
        streamer.put(torch.tensor([token]))


def _lookahead(row: Row) -> Lookahead | None:
    """The lookahead at this point, if the nudging model has written enough for it."""
    answer, ahead, rules = row.answer, row.ahead, row.request.rules
    if rules.allows_only_end(row.constraint, answer.ids):
        return Lookahead((), ended=True)
    # The nudging model writes no more than the answer can take, beyond a few tokens, nor more than it can read.
    length = int(min(row.request.config.num_nudging_tokens, max(_MIN_LOOKAHEAD_BOUND, row.room)))
    most = row.nudging.room - ahead.context
    # A single word that ends inside a character is written on.
    longest = min(length + _MAX_CHARACTER_BYTES - 1, most)
    length = int(min(length, most))
    written = ahead.ids
    while length <= len(written):
        if length < longest and answer.is_one_unfinished_word(written[:length]):
            length += 1
        else:
            words = answer.words(written[:length])
            return rules.restricted(row.constraint, answer.ids, words, ended=False)
    if ahead.end is WritingEnd.EOS:
        return rules.restricted(row.constraint, answer.ids, answer.words(written), ended=True)
    if ahead.end is WritingEnd.BLOCKED:
        return Lookahead(answer.words(written), ended=False)
    if ahead.end is WritingEnd.LOGITS:
        raise ValueError(_bad_logits("nudging model", len(ahead.all_ids), row))
    if ahead.end is WritingEnd.SCORES:
        raise ValueError(_no_choice("nudging model", ahead.best_score, len(ahead.all_ids), row))
    return None


def _verdict(row: Row) -> Verdict | None:
    """Decides on the base's next token, if the base has read so far, and for some gates the nudging model."""
    place = len(row.answer.ids)
    if place >= len(row.predictions):
        return None
    prediction, top1 = row.predictions[place], None
    check_logits(row, place)
    if not math.isfinite(prediction.best):
        raise ValueError(_no_choice("base", prediction.best, place, row))
    if row.confidence.gate.against_nudging_model:
        top1 = row.ahead.first_top1
        if top1 is None:
            return None
        if not math.isfinite(top1):
            raise ValueError(_bad_logits("nudging model", place, row))
    return Verdict(
        token=prediction.token,
        text=to_text(row.answer.vocabulary.bytes_of(prediction.token)),
        is_confident=row.confidence.decide(prediction.score, top1),
        is_eos=prediction.token in row.request.rules.base_eos,
        inside_character=row.answer.inside_character,
    )


def check_logits(row: Row, place: int) -> None:
    """Raises a `ValueError` if the base's logits at a place of the answer are NaN or infinite."""
    if not math.isfinite(row.predictions[place].top1):
        raise ValueError(_bad_logits("base", place, row))


def _bad_logits(whose: str, place: int, row: Row) -> str:
    """The error message for logits that are NaN or infinite."""
    return (
        f"The {whose}'s logits are NaN or infinite at {_where(whose, place, row)}: load the {whose} in another dtype "
        "(float16 overflows where bfloat16 and float32 do not), and look at its weights. `remove_invalid_values` does "
        "not help: such logits do not tell how sure a model is."
    )


def _no_choice(whose: str, best: float, place: int, row: Row) -> str:
    """The error message for logits processors that leave no token to choose."""
    what = "forbid every token (all scores are −∞)" if best == -math.inf else "make a score NaN or +∞"
    which = "`logits_processor` and the generation config" if whose == "base" else "`nudging_model.generation_config`"
    return f"The {whose}'s logits processors {what} at {_where(whose, place, row)}: look at those of {which}."


def _where(whose: str, place: int, row: Row) -> str:
    own = " (in its own vocabulary)" if whose != "base" and isinstance(row.answer, TwoVocabularies) else ""
    return f"token {place + 1} of the answer{own} in row {row.number}"
