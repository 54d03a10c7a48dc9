"""The engine whose base runs elsewhere, behind an OpenAI-compatible API. It knows rows and tasks, never requests.

Each answer is a task of the event loop. The passes of the nudging model, which runs here, serve all of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import aclosing
from functools import partial
from typing import Any

from ..core.row import Row
from ..integrations.openai import EngineError, EngineUnavailable, RemoteBase, Work
from ..pair import Pair
from .engine import AnswerRequest, Stats
from .row_engine import RowEngine, Writing


class RemoteEngine(RowEngine):
    """Writes the nudged answers of a remote base, as many at once as its `max_concurrency`. It serves one event loop.

    Args:
        base: the base. It is closed with [`RemoteEngine.shutdown`].
        nudging_model, nudging_tokenizer: of the nudging model.
        max_waiting, parameters, context_length: see [`RowEngine`].
    """

    _told = (ValueError, EngineError)

    def __init__(
        self,
        base: RemoteBase,
        nudging_model: Any,
        nudging_tokenizer: Any,
        max_waiting: int = 64,
        parameters: Mapping[str, Any] | None = None,
        context_length: int | None = None,
    ):
        pair = Pair(base.described, base.tokenizer, nudging_model, nudging_tokenizer)
        super().__init__(pair, base.max_concurrency, max_waiting, parameters, context_length)
        self._base = base
        self._tasks: dict[Writing, asyncio.Task[None]] = {}

    def stats(self) -> Stats:
        return Stats(len(self._running), len(self._waiting) + self._preparing, *self._base.counts())

    async def _rows(self, request: AnswerRequest) -> list[Row]:
        if request.top_logprobs is not None:
            raise ValueError(
                "`logprobs` cannot be had: the base runs in another engine, which is not asked about the words that "
                "the nudging model writes. Leave it out."
            )
        if request.presence_penalty or request.frequency_penalty:
            raise ValueError(
                "`presence_penalty` and `frequency_penalty` cannot be had: the base runs in another engine, which is "
                "asked for an answer part by part and would not count across them. Leave them out."
            )
        rows = await super()._rows(request)
        for row in rows:
            self._base.requests.fields(row)  # It refuses what the engine cannot be told.
        try:
            await self._base.check(rows[0].request.config.nudge_gate)
        except EngineUnavailable:
            pass  # The answers will wait for it.
        except EngineError as error:
            raise ValueError(str(error)) from error
        return rows

    def _wake(self) -> None:
        for writing, task in self._tasks.items():
            if writing.answers.is_closed:
                task.cancel()
        while self._waiting and len(self._running) < self.max_running:
            writing = self._waiting.popleft()
            self._running.append(writing)
            self._tasks[writing] = task = asyncio.create_task(self._write(writing))
            task.add_done_callback(partial(self._leave, writing))

    async def _write(self, writing: Writing) -> None:
        pair, work = self._pair, Work(writing.row)
        async with aclosing(self._base.write(work, pair.nudging_model, pair.nudging_tokenizer)) as steps:
            async for _ in steps:
                if writing.row.is_open:
                    self._tell(writing, is_finished=False)

    def _leave(self, writing: Writing, task: asyncio.Task[None]) -> None:
        with self._changed:  # Before it is told, so that whoever hears of the end finds a free place.
            self._running.remove(writing)
            del self._tasks[writing]
            self._wake()
        if not task.cancelled():
            self._tell(writing, is_finished=True)

    async def _end(self) -> None:
        self._give_up(self._running)
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._base.close()
