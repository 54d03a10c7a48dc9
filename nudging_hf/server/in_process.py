"""The engine that runs both models in this process. It knows rows and forward passes, never HTTP or text of prompts.

One thread makes all forward passes. Between two of them it lets waiting answers join those that are being written, and
cancelled ones leave. So each answer is that of a call of its own, and no answer waits for the end of another.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch

from ..core.cached_lm import cached_lm
from ..core.decoding import NudgedDecoder
from ..core.draft_policy import borrowed_draft_length
from ..core.drafting import Drafter
from ..pair import Pair
from .engine import AnswerFailed, Stats
from .row_engine import POLL_SECONDS, RowEngine

logger = logging.getLogger(__name__)


class InProcessEngine(RowEngine):
    """Writes the nudged answers of a pair that is in memory. Its threads end with [`InProcessEngine.shutdown`].

    Args:
        pair: both models and their tokenizers.
        max_running, max_waiting, parameters, context_length: see [`RowEngine`].
    """

    def __init__(
        self,
        pair: Pair,
        max_running: int = 8,
        max_waiting: int = 64,
        parameters: Mapping[str, Any] | None = None,
        context_length: int | None = None,
    ):
        super().__init__(pair, max_running, max_waiting, parameters, context_length)
        self._drafts = pair.nudging_config(self._parameters).num_draft_tokens
        self._is_over = False
        self._passes = (0, 0)  # Of decoders that are gone.
        self._decoder: NudgedDecoder | None = None
        self._lent = ExitStack()
        self._thread = threading.Thread(target=self._work, name="nudging-decoder", daemon=True)
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        return super().is_ready and self._thread.is_alive()

    def stats(self) -> Stats:
        with self._changed:
            base, nudging = self._passes
            if self._decoder is not None:
                base += self._decoder.base.forward_passes
                nudging += self._decoder.nudging.forward_passes
            return Stats(len(self._running), len(self._waiting) + self._preparing, base, nudging)

    def _wake(self) -> None:
        self._changed.notify_all()

    async def _end(self) -> None:
        with self._changed:
            self._is_over = True
            self._changed.notify_all()
        while self._thread.is_alive():
            await asyncio.sleep(POLL_SECONDS)

    # The thread that makes the forward passes.

    def _work(self) -> None:
        try:
            with torch.no_grad():
                while self._await_work():
                    self._turn()
        finally:
            with self._changed:
                self._is_closing = True
                left = [*self._running, *self._waiting]
                self._running.clear()
                self._waiting.clear()
            self._give_up(left)
            self._drop_decoder()

    def _await_work(self) -> bool:
        """Waits until there is something to write; returns whether the work goes on."""
        with self._changed:
            while not (self._is_over or self._running or self._waiting):
                self._changed.wait()
            return not self._is_over

    def _turn(self) -> None:
        """Lets answers join and leave, makes one forward pass, and tells what is new."""
        try:
            self._step(self._decoder_at_work())
        except Exception as error:
            logger.error("A forward pass failed. All answers that were being written are given up.", exc_info=error)
            with self._changed:
                lost, self._running = self._running, []
            for each in lost:
                each.answers.send(AnswerFailed(self._reason(error)))
        if not self._running:
            self._drop_decoder()

    def _step(self, decoder: NudgedDecoder) -> None:
        with self._changed:
            gone = [each for each in self._running if each.answers.is_closed]
            joining = []
            self._running = [each for each in self._running if each not in gone]
            while self._waiting and len(self._running) < self.max_running:
                joining.append(self._waiting.popleft())
                self._running.append(joining[-1])
        for each in gone:
            decoder.cancel(each.row)
        for each in joining:
            decoder.admit(each.row)
        if not self._running:
            return
        decoder.step()
        told = self._running
        with self._changed:  # Before it is told, so that whoever hears of the end finds a free place.
            self._running = [each for each in told if each.row in decoder.rows]
        for each in told:
            self._tell(each, is_finished=each not in self._running)

    def _decoder_at_work(self) -> NudgedDecoder:
        if self._decoder is None:
            base, nudging = (cached_lm(model, rows=0) for model in (self._pair.base, self._pair.nudging_model))
            setting = ("served", self.max_running, base.cache_kind)
            policy = self._lent.enter_context(borrowed_draft_length(base.model, nudging.model, setting))
            drafter = Drafter(self._drafts, policy, lambda numbers: numbers)
            self._decoder = NudgedDecoder(base, nudging, drafter, isolates_errors=True)
        return self._decoder

    def _drop_decoder(self) -> None:
        """Lets go of the caches of both models."""
        with self._changed:
            if self._decoder is not None:
                base, nudging = self._passes
                self._passes = (
                    base + self._decoder.base.forward_passes,
                    nudging + self._decoder.nudging.forward_passes,
                )
            self._decoder = None
        self._lent.close()
        if self._pair.base.device.type == "cuda":
            torch.cuda.empty_cache()
