"""What the answers of one event loop share, and how they wait for an engine. It knows connections, never rows."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any, NamedTuple

from transformers.utils import logging

from ...core.vocabulary import Vocabulary
from .completions import Completions, EngineError, EngineUnavailable
from .engine_probe import Abilities, probe
from .shared_writer import SharedWriter

logger = logging.get_logger(__name__)

_FIRST_DELAY, _LONGEST_DELAY = 0.25, 10.0  # Seconds between tries.


class Counts(NamedTuple):
    """What answers have taken: tokens that the engine has sent, and passes of the nudging model."""

    base_tokens: int
    nudging_forward_passes: int


class Session:
    """What the answers of one event loop share: connections, places, writers, and what is known of the engine."""

    def __init__(
        self, completions: Completions, vocabulary: Vocabulary, places: int, stop_fields: dict[str, Any] | None
    ):
        self.completions = completions
        self.places = asyncio.Semaphore(places)
        self._vocabulary, self._stop_fields = vocabulary, stop_fields
        self._writers: dict[tuple[int, int], tuple[SharedWriter, Any, Any]] = {}
        self._abilities: dict[int, Abilities] = {}
        self._trying = asyncio.Lock()

    def counts(self) -> Counts:
        passes = [writer.decoder.nudging.forward_passes for writer, _, _ in self._writers.values()]
        return Counts(self.completions.tokens, sum(passes))

    def writer(self, nudging_model: Any, nudging_tokenizer: Any) -> SharedWriter:
        """The writer of a nudging model. All answers that share it have the same token rules of the pair."""
        key = (id(nudging_model), id(nudging_tokenizer))
        if key not in self._writers:  # Both stay alive with it, so that no other gets the same id.
            self._writers[key] = SharedWriter(nudging_model), nudging_model, nudging_tokenizer
        return self._writers[key][0]

    async def abilities(self, logprobs: int) -> Abilities:
        """What the engine can do, tried once."""
        async with self._trying:
            if logprobs not in self._abilities:
                self._abilities[logprobs] = await probe(
                    self.completions, self._vocabulary, logprobs, self._stop_fields
                )
            return self._abilities[logprobs]

    async def close(self) -> None:
        for writer, _, _ in self._writers.values():
            await writer.close()
        await self.completions.close()


class Waiting:
    """How long an answer waits before it asks again: exponentially longer, with jitter, and no longer than is given.

    Args:
        most: how many seconds the waiting may take in all.
    """

    def __init__(self, most: float):
        self._most, self._tries = most, 0
        self._began: float | None = None

    async def after(self, error: EngineUnavailable) -> None:
        """Waits after a failure.

        Raises:
            EngineError: if this has gone on for too long.
        """
        now = time.monotonic()
        self._began = now if self._began is None else self._began
        left = self._began + self._most - now
        if left <= 0 or error.retry_after > left:
            if not self._most:
                raise error
            raise EngineError(
                f"The engine was asked for {self._most:g} seconds (`retry_for`) in vain. {error}"
            ) from None
        delay = min(_LONGEST_DELAY, _FIRST_DELAY * 2**self._tries) * random.uniform(0.5, 1.0)
        delay = min(left, max(delay, error.retry_after * random.uniform(1.0, 1.1)))
        self._tries += 1
        logger.info(f"Asking the engine again in {delay:.1f} s: {error}")
        await asyncio.sleep(delay)
