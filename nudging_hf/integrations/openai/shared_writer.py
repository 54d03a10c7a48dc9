"""One nudging model that writes for many rows of an event loop. It knows rows that wait, never an engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import torch

from ...core.advance import end, must_write
from ...core.cached_lm import cached_lm
from ...core.config import ADAPTIVE
from ...core.draft_policy import DraftLength
from ...core.drafting import Drafter
from ...core.row import Row
from ..engine_decoder import EngineDecoder


class SharedWriter:
    """Lets the nudging model write in a thread of its own, while the event loop goes on with other rows.

    Each pass serves all rows that wait when it begins. All methods are called in one event loop.

    Args:
        nudging_model: a causal language model.

    Attributes:
        decoder: holds the rows. Only [`EngineDecoder.take_in`], `tell` and `pending` may be called from outside.
    """

    def __init__(self, nudging_model: Any):
        with torch.no_grad():
            self.decoder = EngineDecoder(cached_lm(nudging_model, 0), Drafter(ADAPTIVE, DraftLength(), list))
        self._waiting: dict[Row, asyncio.Future[None]] = {}
        self._errands: list[Callable[[], None]] = []
        self._work: asyncio.Task[None] | None = None

    async def admit(self, row: Row) -> None:
        """Begins a row, and returns when it waits for the base."""
        self._errands.append(lambda: self.decoder.admit(row))
        await self._wait(row)

    async def write(self, row: Row) -> None:
        """Returns when the row does not wait for the nudging model."""
        if waits(row):
            await self._wait(row)

    def forget(self, row: Row) -> None:
        """Drops a row that was admitted, finished or not, as soon as no pass is running."""
        if (future := self._waiting.pop(row, None)) is not None:
            future.cancel()
        self._errands.append(lambda: self.decoder.forget(row))
        self._start()

    async def close(self) -> None:
        """Returns when all rows that were to be forgotten are."""
        if self._work is not None:
            await self._work

    async def _wait(self, row: Row) -> None:
        future = self._waiting[row] = asyncio.get_running_loop().create_future()
        self._start()
        await future

    def _start(self) -> None:
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while self._waiting or self._errands:
            errands, self._errands = self._errands, []
            rows = list(self._waiting)
            problem = None
            try:
                await asyncio.to_thread(self._pass, errands, rows)
            except Exception as error:  # It belongs to no row, so that each must know.
                problem = error
            for row in rows:
                if problem is None and waits(row):
                    continue
                if (future := self._waiting.pop(row, None)) is None or future.done():
                    continue
                if problem is None:
                    future.set_result(None)
                else:
                    future.set_exception(problem)

    @torch.no_grad()
    def _pass(self, errands: list[Callable[[], None]], rows: list[Row]) -> None:
        for errand in errands:
            errand()
        waiting = [row for row in rows if waits(row)]
        if not waiting:
            return
        try:
            self.decoder.write(waiting)
        except Exception as error:
            if len(waiting) == 1:
                waiting[0].error = error
                end(waiting[0], "error")
                return
            for row in waiting:  # The others must not end with the one that cannot be written.
                self._pass([], [row])


def waits(row: Row) -> bool:
    """Whether a row waits for the nudging model."""
    return row.is_open and must_write(row)
