"""Thresholds on scripted scores."""

import random

import pytest

from nudging_hf import NudgingConfig
from nudging_hf.core.threshold import FixedThreshold, OnlineThreshold, threshold_of


def test_gamma_is_inclusive():
    fixed = FixedThreshold(0.5)
    assert fixed.is_confident(0.5) and not fixed.is_confident(0.499)


@pytest.mark.parametrize(
    ("gate", "threshold", "below", "above"), [("top1", 0.4, 0.3, 0.5), ("entropy", 2, -2.1, -1.9)]
)
def test_the_cutoff_is_that_of_the_gate(gate, threshold, below, above):
    fixed = threshold_of(NudgingConfig(nudge_gate=gate, nudge_threshold=threshold))
    assert fixed.is_confident(above) and not fixed.is_confident(below)


@pytest.mark.parametrize("target", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("power", [1, 8, 1 / 8])
def test_a_long_answer_comes_to_the_target_whatever_the_scores_are(target, power):
    draw = random.Random(1).random
    online, nudged = OnlineThreshold(target, 0.4, highest=1), []
    for _ in range(2000):
        nudged.append(not online.is_confident(draw() ** power))
        online.take(b"word ", nudged[-1])
    assert sum(nudged) / len(nudged) == pytest.approx(target, abs=0.02)


def test_a_word_is_nudged_if_some_of_it_is():
    pieces = [
        (b"Some", False),
        (b"thing", True),
        (b" of", False),
        (b" ", True),
        (b"it\xc3", False),
        (b"\xa9\n", False),
    ]
    split = [(bytes([byte]), nudged) for piece, nudged in pieces for byte in piece]
    levels = []
    for each in (pieces, split):
        online = OnlineThreshold(0.1, 0.4, highest=1)
        for piece, nudged in each:
            online.take(piece, nudged)
        levels.append(online._level)
    assert levels == [pytest.approx(0.1 + 0.05 * (3 * 0.1 - 1))] * 2


def test_the_first_scores_are_compared_with_a_fixed_cutoff():
    online = OnlineThreshold(0.1, 0.4, highest=1)
    assert [online.is_confident(score) for score in [0.39, 0.4] * 4] == [False, True] * 4
    assert online.is_confident(0.39)  # The least of what was heard is not less than a tenth of it.


def test_the_cutoff_does_not_rise_beyond_the_highest():
    online = OnlineThreshold(0.5, 0.4, highest=0.6)
    for score in [0.7, 0.8, 0.9] * 100:
        assert online.is_confident(score)
        online.take(b"word ", False)
    assert not online.is_confident(0.59)
