"""How far to draft: as far as is worth its time, by what drafts brought and passes took. It knows numbers alone.

A base pass over a draft of k tokens brings 1 + a + ... + a^k tokens, where a is the chance that the answer goes on
with a drafted token. It takes the time of a pass over k + 1 tokens, and of the steps in which the nudging model writes
what it has not yet written. The length that brings most tokens a second is chosen: Leviathan et al., "Fast Inference
from Transformers via Speculative Decoding" (arXiv 2211.17192), section 3.5, with measured times in the place of a
constant ratio. No draft is among the lengths, so that a draft that does not help costs what finding it out costs.

What was found out about two models is kept for as long as they are.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

LENGTHS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_FIRST = 8  # Before any pass has been timed; none is drafted in the second.
_NEW = 0.25  # What an observation weighs in a mean.
_FADE = 0.998  # What a time that was not observed becomes with each that was: it is tried again some day.
_MEMORY = 0.9  # What a draft weighs after another one.
_HOPE = 0.005  # Of a token that might have been drafted, was not, and might have been good.
_FIRST_RATE, _FIRST_WEIGHT = 0.9, 5.0


@dataclass
class Acceptance:
    """The chance that a drafted token is good, from those that were."""

    hits: float = _FIRST_RATE * _FIRST_WEIGHT
    misses: float = (1 - _FIRST_RATE) * _FIRST_WEIGHT

    def observe(self, hits: int, drafted: int) -> None:
        """Takes note of a draft of `drafted` tokens, of which the first `hits` were good."""
        if drafted:
            self.hits = _MEMORY * self.hits + hits
            self.misses = _MEMORY * self.misses + (hits < drafted)
        else:
            self.hits += _HOPE

    @property
    def rate(self) -> float:
        return self.hits / (self.hits + self.misses)


class PassTime:
    """The time of a base pass, by how many tokens a row of it has."""

    def __init__(self) -> None:
        self._seconds: dict[int, float] = {}

    def knows(self, width: int) -> bool:
        return width in self._seconds

    def observe(self, width: int, seconds: float) -> None:
        """Takes note of a pass."""
        before = self._seconds.get(width, seconds)
        self._seconds = {each: known * _FADE for each, known in self._seconds.items()}
        self._seconds[width] = (1 - _NEW) * before + _NEW * seconds

    def __call__(self, width: int) -> float:
        """Along straight lines between what is known, and on along the last of them."""
        known = sorted(self._seconds)
        if width in self._seconds or len(known) == 1:
            return self._seconds.get(width, self._seconds[known[0]])
        right = min(max(bisect_left(known, width), 1), len(known) - 1)
        low, high = known[right - 1], known[right]
        slope = max(0.0, (self._seconds[high] - self._seconds[low]) / (high - low))
        return max(0.0, self._seconds[low] + slope * (width - low))


class DraftLength:
    """Chooses how many tokens the rows of a batch draft: one length for all, for the widest row makes the pass.

    Attributes:
        base_pass: what is known of the base's passes.
        acceptance: what is known of all drafts.
    """

    def __init__(self) -> None:
        self.base_pass = PassTime()
        self.acceptance = Acceptance()
        self._step: float | None = None

    def of_new_row(self) -> Acceptance:
        """What is to be thought of the drafts of an answer that is just begun."""
        rate = self.acceptance.rate
        return Acceptance(rate * _FIRST_WEIGHT, (1 - rate) * _FIRST_WEIGHT)

    def observe_step(self, seconds: float) -> None:
        """Takes note of a step in which the nudging model wrote a token in each row that wanted one."""
        self._step = seconds if self._step is None else (1 - _NEW) * self._step + _NEW * seconds

    def choose(self, rows: Iterable[tuple[Acceptance, int]]) -> int:
        """The length that promises most tokens a second.

        Args:
            rows: for each row of the batch its acceptance, and how many tokens are written already.
        """
        if self._step is None or not self.base_pass.knows(1):
            return 0 if self.base_pass.knows(_FIRST + 1) else _FIRST
        rates, written = zip(*((acceptance.rate, n) for acceptance, n in rows), strict=True)

        def speed(length: int) -> float:
            brought = sum(sum(rate**i for i in range(length + 1)) for rate in rates)
            steps = max(0, length - min(written))
            return brought / (self.base_pass(length + 1) + steps * self._step)

        return max(LENGTHS, key=speed)


_KNOWN: WeakKeyDictionary[Any, WeakKeyDictionary[Any, dict[Hashable, DraftLength]]] = WeakKeyDictionary()


def draft_length_of(base: Any, nudging_model: Any, way: Hashable) -> DraftLength:
    """The one of two models and a way of running them, with all that earlier answers have told.

    Args:
        way: all else on which the time of a pass depends: how many rows it has, and so on.
    """
    pairs = _KNOWN.setdefault(base, WeakKeyDictionary())
    return pairs.setdefault(nudging_model, {}).setdefault(way, DraftLength())
