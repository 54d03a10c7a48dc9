"""The in-process executor: it answers the questions of all rows with as few forward passes as it can.

It knows questions, drafts and limits, never the rules of the algorithm. The algorithm in `rounds` asks what the
nudging model would write next and what the base's verdict is. The executor gathers the questions of all rows, answers
those of one kind in one forward pass, and answers early: the base reads the answer *and* what the nudging model has
written after it, and the predictions at all these positions are kept. If the answer continues along the nudging
model's text, its next verdicts are known already. If it does not, the rest is dropped and both caches roll back. So
drafts save forward passes and cannot change an answer.

Each step plans, runs one forward pass of one model, and takes in what the pass has said. Rows may join and leave
between two steps.

Sampling: a token is a function of its row's seed, its place and the distribution there, so a verdict is the same
whether it is asked for early or late. A draft token is accepted if it is the token that is drawn, that is, with the
base's probability p of it. This is the rule of speculative sampling (Leviathan et al., arXiv 2211.17192), which
accepts with probability min(1, p / q) and otherwise draws from the residual, for a draft that is already fixed, so
that q = 1.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from . import predicting
from .advance import advance, begin, check_logits, draft, draft_progress, end, must_read, must_write
from .cached_lm import CachedLM, Reading, SeparateRows
from .drafting import Drafter
from .predicting import predictions, rank_accepted
from .row import Row
from .sampling import joined
from .writing import write


class _Write(NamedTuple):
    """The nudging model writes a token in each of these rows.

    Args:
        is_forced: whether some row must write, so that the others draft for free.
    """

    rows: list[Row]
    is_forced: bool


class _Read(NamedTuple):
    """The base reads these rows, and drafts of up to so many tokens."""

    rows: list[Row]
    draft_length: int


class NudgedDecoder:
    """Writes the nudged answers of many rows.

    Args:
        base, nudging: both models, which have admitted a row for each of `rows`.
        drafter: plans the drafts.
        rows: the answers to write. Each ends with a `finish_reason`.
        isolates_errors: whether an error in one row ends that row alone, with its `error`. Otherwise it is raised.

    Attributes:
        rows (`list[Row]`): those that have not ended, or of which the base has not yet recorded all predictions.
    """

    def __init__(
        self,
        base: CachedLM | SeparateRows,
        nudging: CachedLM | SeparateRows,
        drafter: Drafter,
        rows: Iterable[Row] = (),
        isolates_errors: bool = False,
    ):
        self.base = base
        self.nudging = nudging
        self.drafter = drafter
        self.rows = list(rows)
        self.isolates_errors = isolates_errors
        self._next_number = len(self.rows)
        self._tokens_of_departed = 0

    def run(self) -> None:
        """Writes all answers to their end."""
        while self.step():
            pass

    def admit(self, row: Row) -> None:
        """Lets a row join the others from the next step on. It gets a number in both caches."""
        row.number = self._next_number
        self._next_number += 1
        self.base.admit(row.number)
        self.nudging.admit(row.number)
        self.rows.append(row)

    def cancel(self, row: Row) -> None:
        """Ends an answer that nobody waits for any more."""
        if row not in self.rows:
            return
        if row.is_open:
            end(row, "cancelled")
            self.nudging.release(row.number)
        self._dismiss(row)

    def step(self) -> bool:
        """Makes one forward pass of one model and takes in what it says.

        Returns:
            Whether there was anything to do.
        """
        self._take_in([row for row in self._open_rows() if row.question is None])
        work = self._plan()
        if work is None:
            return False
        if isinstance(work, _Write):
            write(self.nudging, work.rows, self.drafter, work.is_forced)
        else:
            self._read(work)
        self._take_in(self._open_rows())
        return True

    # Plan: which model makes the next pass, and for which rows.

    def _plan(self) -> _Write | _Read | None:
        rows = self._open_rows()
        forced = [row for row in rows if must_write(row)]
        if rows and len(forced) == len(rows):
            return _Write(rows, is_forced=True)
        if rows and not forced and self.drafter.awaits_verification:
            drafts = [(row.predictions.draft_top1_probs, row.predictions.accepted) for row in rows]
            self.drafter.verified(drafts, self._answer_tokens())
        draft_length = 0
        if rows:
            progress = [draft_progress(row) for row in rows]
            plan = self.drafter.plan(progress, steps_are_free=bool(forced), reread=lambda: self._reread(rows))
            draft_length = plan.read
            unfinished = [
                row
                for row, each in zip(rows, progress, strict=True)
                if row in forced or each.is_shorter_than(plan.write)
            ]
            if unfinished:
                return _Write(unfinished, is_forced=bool(forced))
        due = [row for row in self.rows if (must_read(row) if row.is_open else not _is_recorded(row))]
        return _Read(due, draft_length) if due else None

    def _open_rows(self) -> list[Row]:
        return [row for row in self.rows if row.is_open]

    def _answer_tokens(self) -> int:
        return self._tokens_of_departed + sum(len(row.answer.ids) for row in self.rows)

    def _reread(self, rows: list[Row]) -> int | None:
        if not self.base.has_recurrent_state:
            return None
        unread = [self.base.num_unread(row.number, [*row.answer.prompt, *row.answer.ids]) for row in rows]
        return max(0, max(unread) - 1)

    # Take in: each row's questions are answered as far as what is known carries.

    def _take_in(self, rows: list[Row]) -> None:
        for row in rows:
            if row.request.limits.time_is_up():
                end(row, "time")
        for row in rows:
            self._guarded(row, _advance)
        for row in rows:
            if not row.is_open:
                self.nudging.release(row.number)
                if row.error is not None or _is_recorded(row):
                    self._dismiss(row)

    def _dismiss(self, row: Row) -> None:
        rank_accepted([row])
        self.base.release(row.number)
        self.rows.remove(row)
        self._tokens_of_departed += len(row.answer.ids)

    def _guarded(self, row: Row, action: Callable[[Row], None]) -> None:
        try:
            action(row)
        except Exception as error:
            if not self.isolates_errors:
                raise
            row.error = error
            if row.is_open:
                end(row, "error")

    # Run: a pass of one model.

    def _read(self, work: _Read) -> None:
        """Lets the base read each row's answer and draft, and predict at every position that it has not read."""
        rows = work.rows
        rank_accepted(self.rows)  # Now, so that the last pass's logits need not be kept beside those of this one.
        reads_prompts = not all(len(row.predictions) for row in rows)
        self.drafter.read(self._answer_tokens())
        for row in rows:
            _start_pass(row, work.draft_length)
        readings = {row.number: _base_reading(row) for row in rows}
        began = time.perf_counter()
        logits = self.base.read(readings)
        # Logits processors work where the caller's ids are, which need not be where the base is.
        raw = joined([logits[row.number] for row in rows]).to(rows[0].base.prompt.device, torch.float32)
        said = predictions(
            raw, [predicting.Reading(row, row.predictions.read, readings[row.number].keep) for row in rows]
        )
        self.drafter.time_pass(self.base.last_shape, time.perf_counter() - began, reads_prompts)
        for row, own in zip(rows, said, strict=True):
            for prediction in own:
                row.predictions.add(prediction)
            if not row.is_open:
                self._guarded(row, _check_recorded)
                self._dismiss(row)


def _advance(row: Row) -> None:
    if row.is_open and row.question is None:
        begin(row)
    advance(row)


def _is_recorded(row: Row) -> bool:
    """Whether the base has predicted every token of an answer that has ended, if that is wanted."""
    return not row.request.records or len(row.predictions) >= len(row.answer.ids)


def _start_pass(row: Row, draft_length: int) -> None:
    answer = row.answer
    if not row.is_open:
        return row.predictions.start_pass(answer.ids[:-1], (), ())
    ids = draft(row, draft_length)
    row.predictions.start_pass(answer.ids, ids, answer.draft_top1_probs(ids, row.ahead.ids, row.ahead.top1_probs))


def _base_reading(row: Row) -> Reading:
    prompt, read = row.answer.prompt, row.predictions.read
    keep = len(read) + 1 - len(row.predictions)
    return Reading([*prompt, *read], keep, settled=len(prompt) + len(row.answer.ids))


def _check_recorded(row: Row) -> None:
    for place in range(len(row.answer.ids)):
        check_logits(row, place)
