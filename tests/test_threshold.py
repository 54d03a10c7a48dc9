"""Fixed and online cutoffs on scripted scores."""

import random

import pytest

from nudging_hf import NudgingConfig
from nudging_hf.core.gate import GATES, Confidence, FixedCutoff, OnlineCutoff


def online(target, highest=1.0):
    """A top-1 gate with an online cutoff that starts at 0.4."""
    return Confidence(GATES["top1"], OnlineCutoff(target, 0.4, highest))


def test_the_threshold_is_inclusive():
    fixed = Confidence(GATES["top1"], FixedCutoff(0.5))
    assert fixed.decide(0.5, None) and not fixed.decide(0.499, None)


@pytest.mark.parametrize(
    ("gate", "threshold", "below", "above"), [("top1", 0.4, 0.3, 0.5), ("entropy", 2, -2.1, -1.9)]
)
def test_the_cutoff_follows_the_direction_of_the_gate(gate, threshold, below, above):
    fixed = Confidence.of_answer(NudgingConfig(nudge_gate=gate, nudge_threshold=threshold))
    assert fixed.decide(above, None) and not fixed.decide(below, None)


def test_rejection_compares_with_the_nudging_model():
    fixed = Confidence.of_answer(NudgingConfig(nudge_gate="rejection", nudge_threshold=0.25))
    assert fixed.decide(0.5, 0.75) and not fixed.decide(0.5, 0.76)


@pytest.mark.parametrize("target", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("power", [1, 8, 1 / 8])
def test_a_long_answer_approaches_the_target_whatever_the_scores_are(target, power):
    draw = random.Random(1).random
    confidence, nudged = online(target), []
    for _ in range(2000):
        nudged.append(not confidence.decide(draw() ** power, None))
        confidence.observe_text(b"word ", nudged[-1])
    assert sum(nudged) / len(nudged) == pytest.approx(target, abs=0.02)


def test_a_word_is_nudged_if_any_part_of_it_is():
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
        cutoff = OnlineCutoff(0.1, 0.4, highest=1)
        for piece, nudged in each:
            cutoff.observe_text(piece, nudged)
        levels.append(cutoff._level)
    assert levels == [pytest.approx(0.1 + 0.05 * (3 * 0.1 - 1))] * 2


def test_the_first_scores_are_compared_with_a_fixed_cutoff():
    confidence = online(0.1)
    assert [confidence.decide(score, None) for score in [0.39, 0.4] * 4] == [False, True] * 4
    assert confidence.decide(0.39, None)  # Now the cutoff is the lowest score so far, and 0.39 reaches it.


def test_the_cutoff_does_not_rise_above_the_highest():
    confidence = online(0.5, highest=0.6)
    for score in [0.7, 0.8, 0.9] * 100:
        assert confidence.decide(score, None)
        confidence.observe_text(b"word ", False)
    assert not confidence.decide(0.59, None)


def test_a_target_is_a_share_of_the_words_of_the_setting():
    """By spaces one word ends here, and it is nudged. By UAX #29 five end, of which two are."""
    levels = {}
    for boundary in ("space", "unicode"):
        config = NudgingConfig(nudge_threshold="auto", target_nudge_rate=0.5, word_boundary=boundary)
        confidence = Confidence.of_answer(config)
        for piece, nudged in (("我们".encode(), True), ("去北京。".encode(), False), (b" ", False)):
            confidence.observe_text(piece, nudged)
        levels[boundary] = confidence._cutoff._level
    assert levels["space"] == pytest.approx(0.5 - 0.05 * 0.5)
    assert levels["unicode"] == pytest.approx(0.5 + 0.05 * (3 * 0.5 - 2 * 0.5))
