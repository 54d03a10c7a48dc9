"""Nudged decoding whose base is run by an inference engine. It knows rows and predictions, never the engine.

An engine with speculative decoding runs a pass over each request's last token and a draft, and is told which tokens
were sampled. This decoder answers from what the pass predicts: `decide` runs the algorithm of the request as far as
the predictions carry, and returns by which tokens the engine's text grows. These are the draft's tokens as far as the
answer goes on with them, and one more token, so the engine rolls back what it has read beyond them as it always does.

A word that the nudging model writes is accepted as a whole, but the engine grows by one token beyond its draft. The
rest of the word is *pending*: it comes first in the next draft, and is accepted there whatever the base predicts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from ..core.advance import advance, begin, draft, draft_progress, end, must_write
from ..core.cached_lm import CachedLM, SeparateRows, common_prefix
from ..core.draft_policy import DraftProgress
from ..core.drafting import Drafter
from ..core.row import Prediction, Row
from ..core.writing import write


class EnginePass(NamedTuple):
    """What an engine's pass has brought to one request.

    Args:
        draft: the ids that the base has read after the tokens that the engine was told.
        predictions: what it says after them: `len(draft) + 1` predictions.
    """

    draft: Sequence[int]
    predictions: Sequence[Prediction]


class _Draft(NamedTuple):
    """The last draft of a row: how many pending tokens it begins with, and the top-1 probabilities of the others."""

    pending: int
    top1_probs: Sequence[float]


class EngineDecoder:
    """Decides for an engine how the texts of its requests grow, and drafts what the base reads next.

    An error in one row ends that row alone, with its `error`. Its answer then keeps what it has.

    Args:
        nudging: the nudging model, without rows.
        drafter: plans the drafts.
    """

    def __init__(self, nudging: CachedLM | SeparateRows, drafter: Drafter):
        self.nudging = nudging
        self._drafter = drafter
        self._told: dict[Row, int] = {}  # How many tokens of each answer the engine was told.
        self._writing: set[Row] = set()  # The rows that the nudging model has in its cache.
        self._drafts: dict[Row, _Draft] = {}
        self._outcomes: list[tuple[Sequence[float], int]] = []  # Of the drafts of the last pass.
        self._next_number = 0
        self._tokens = 0  # By which the engine's texts have grown.

    @property
    def rows(self) -> list[Row]:
        """The rows that were admitted and not forgotten."""
        return list(self._told)

    def admit(self, row: Row) -> None:
        """Begins a row. It gets a number in the nudging model's cache."""
        row.number = self._next_number
        self._next_number += 1
        self.nudging.admit(row.number)
        self._told[row] = 0
        self._writing.add(row)
        self._guarded(row, begin)

    def forget(self, row: Row) -> None:
        """Drops a row that the engine has finished, aborted or lost."""
        if row.is_open:
            end(row, "cancelled")
        self._stop_writing(row)
        self._drafts.pop(row, None)
        del self._told[row]

    def told(self, row: Row) -> int:
        """How many tokens of the answer the engine was told."""
        return self._told[row]

    def pending(self, row: Row) -> list[int]:
        """The tokens that the answer has accepted and the engine was not told."""
        return row.answer.ids[self._told[row] :]

    def decide(
        self, passes: Mapping[Row, EnginePass], seconds: float | None = None, draft_length: int = 0
    ) -> dict[Row, list[int]]:
        """Takes in what the engine's pass predicts, and lets the nudging model write what is then wanted.

        These are [`take_in`], [`write`] and [`tell`] in turn, which an engine whose requests do not run in step calls
        itself.

        Args:
            passes: for each row that the engine has run, with all its prompt read.
            seconds: what the pass took, if it read no prompts. The draft length is chosen by it.
            draft_length: how long the drafts of the next pass can be. While some row must write, the others write
                ahead for these drafts in the same passes of the nudging model.

        Returns:
            The ids by which each row's text grows in the engine: between one and `len(draft) + 1`. It is empty only
            where the answer has ended and the engine has been told all of it.
        """
        self._drafter.read(self._tokens)
        if seconds is not None and passes:
            fed = sum(len(each.draft) + 1 for each in passes.values())
            self._drafter.time_pass((len(passes), math.ceil(fed / len(passes))), seconds, reads_prompts=False)
        for row, engine_pass in passes.items():
            self.take_in(row, engine_pass)
        while forced := [row for row in passes if row.is_open and must_write(row)]:
            self.write(self._plan([row for row in passes if row.is_open], draft_length, forced)[0])
        self._outcomes = []
        grown = {row: self.tell(row, read) for row, (read, _) in passes.items()}
        for row in passes:
            if not row.is_open:
                self._stop_writing(row)
        return grown

    def take_in(self, row: Row, engine_pass: EnginePass) -> None:
        """Takes in what the engine's pass predicts in one row, and runs its algorithm as far as that carries.

        No forward pass is made, and no other row is touched, so another thread may be in [`write`] for other rows.
        """
        read, said = engine_pass
        row.predictions.read_by_engine(row.answer.ids, self._told[row], read, said)
        self._guarded(row, advance)

    def write(self, rows: Sequence[Row]) -> None:
        """Lets the nudging model write in rows that wait for it, in one pass, and runs their algorithm on."""
        write(self.nudging, rows, self._drafter, is_forced=True)
        for row in rows:
            self._guarded(row, advance)

    def tell(self, row: Row, draft: Sequence[int]) -> list[int]:
        """The ids by which a row's text grows in the engine after a pass over a draft. They count as told."""
        pending = self.pending(row)
        accepted = common_prefix(pending, list(draft))
        grown = pending[: accepted + 1]
        self._told[row] += len(grown)
        self._tokens += len(grown)
        if (last := self._drafts.pop(row, None)) is not None:
            top1_probs = last.top1_probs[: max(0, len(draft) - last.pending)]
            self._outcomes.append((top1_probs, min(len(top1_probs), max(0, accepted - last.pending))))
        return grown

    def drafts(self, rows: Sequence[Row], length: int) -> dict[Row, list[int]]:
        """What the base is to read next in each row, after the tokens that the engine was told.

        Args:
            rows: that the engine will run next.
            length: how many ids a draft has at most. Pending tokens come first, and what the nudging model writes
                after them follows.
        """
        if self._drafter.awaits_verification:
            self._drafter.verified(self._outcomes, self._tokens)
        open_rows, read = [row for row in rows if row.is_open], 0
        while open_rows:
            writing, read = self._plan(open_rows, length)
            if not writing:
                break
            write(self.nudging, writing, self._drafter, is_forced=False)
        drafts = {}
        for row in rows:
            pending = self.pending(row)[:length]
            more = draft(row, min(read, length - len(pending))) if row.is_open else []
            top1_probs = row.answer.draft_top1_probs(more, row.ahead.ids, row.ahead.top1_probs)
            self._drafts[row] = _Draft(len(pending), top1_probs)
            drafts[row] = [*pending, *more]
        return drafts

    def _plan(self, rows: Sequence[Row], length: int, forced: Sequence[Row] = ()) -> tuple[list[Row], int]:
        """Returns the rows that write next, and how many tokens of their drafts the base reads once none is left."""
        progress = [self._progress(row, length) for row in rows]
        plan = self._drafter.plan(progress, steps_are_free=bool(forced), reread=lambda: None)
        writing = [
            row for row, each in zip(rows, progress, strict=True) if row in forced or each.is_shorter_than(plan.write)
        ]
        return writing, plan.read

    def _progress(self, row: Row, length: int) -> DraftProgress:
        written, limit = draft_progress(row)
        return DraftProgress(written, min(limit, max(0, length - len(self.pending(row)))))

    def _guarded(self, row: Row, action: Callable[[Row], None]) -> None:
        try:
            action(row)
        except Exception as error:
            row.error = error
            if row.is_open:
                end(row, "error")

    def _stop_writing(self, row: Row) -> None:
        if row in self._writing:
            self._writing.remove(row)
            self.nudging.release(row.number)
