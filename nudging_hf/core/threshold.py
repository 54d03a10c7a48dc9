"""What a base's score is compared with: a number, or one that sets itself. It knows numbers and words alone."""

from __future__ import annotations

from bisect import insort
from math import inf

from .config import AUTO, NudgingConfig
from .gate import GATES

_FEWEST_SCORES = 8  # Below which their quantiles say little.
_STEP = 0.05


class FixedThreshold:
    """One cutoff for a whole answer."""

    def __init__(self, cutoff: float):
        self._cutoff = cutoff

    def is_confident(self, score: float) -> bool:
        """Whether the base is confident. Asked once for each verdict that the algorithm asks for, in its order."""
        return score >= self._cutoff

    def take(self, text: bytes, nudged: bool) -> None:
        """Takes note of what the answer grows by, and of who wrote it."""


class OnlineThreshold:
    """A cutoff that follows the base's scores of one answer, so that a share of its words is nudged.

    The cutoff is a quantile of the scores heard so far, and the quantile's level moves with each word: up by
    step * target where the base wrote it, down by step * (1 - target) where the nudging model wrote some of it. So the
    level adds up how far the two shares are apart, and in a long answer the share of nudged words comes to the target,
    whatever the scores are: the update of adaptive conformal inference (Gibbs and Candes, arXiv 2106.00170). Beyond
    `highest` the cutoff does not rise: a base that is sure of nearly everything is nudged less than the target says.

    It is a function of the answer so far: neither drafts nor other rows of a batch change it.

    Args:
        target: the share of words, in (0, 1), that the nudging model is to write.
        first: the cutoff while too few scores have been heard.
        highest: the highest cutoff.
    """

    def __init__(self, target: float, first: float, highest: float):
        self._target = target
        self._first = first
        self._highest = highest
        self._level = target
        self._scores: list[float] = []  # In their order.
        self._is_within_word = self._word_is_nudged = False

    def is_confident(self, score: float) -> bool:
        cutoff = self._cutoff()
        insort(self._scores, score)
        return score >= cutoff

    def _cutoff(self) -> float:
        if len(self._scores) < _FEWEST_SCORES:
            return self._first
        if self._level < 0:
            return -inf
        place = int(self._level * len(self._scores))
        return min(self._scores[place], self._highest) if place < len(self._scores) else self._highest

    def take(self, text: bytes, nudged: bool) -> None:
        for i in range(len(text)):
            if text[i : i + 1].isspace():
                self._end_word()
            else:
                self._is_within_word = True
                self._word_is_nudged = self._word_is_nudged or nudged

    def _end_word(self) -> None:
        if self._is_within_word:
            self._level += _STEP * (self._target - self._word_is_nudged)
        self._is_within_word = self._word_is_nudged = False


def threshold_of(config: NudgingConfig) -> FixedThreshold | OnlineThreshold:
    """The threshold for one answer."""
    gate = GATES[config.nudge_gate]
    if config.nudge_threshold == AUTO:
        first = NudgingConfig(nudge_gate=config.nudge_gate).nudge_threshold
        return OnlineThreshold(config.target_nudge_rate, gate.cutoff(float(first)), gate.cutoff(gate.strictest))
    return FixedThreshold(gate.cutoff(float(config.nudge_threshold)))
