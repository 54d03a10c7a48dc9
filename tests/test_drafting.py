"""The draft length on machines and answers made up: it comes to the best one, and to none where none is good."""

import gc
import random
import weakref

import pytest
from tiny import pair

from nudging_hf.drafting import LENGTHS, Acceptance, DraftLength, PassTime, draft_length_of

# Seconds of a pass by its width: a device that is waiting for its memory, and two that compute.
FLAT, RISING, STEEP = (lambda w: 1 + 0.01 * w), (lambda w: 1 + 0.1 * w), (lambda w: 0.2 + 0.8 * w)


def tokens_and_seconds(rates, pass_time, step, passes, noise=0.0, seed=0, length=None):
    """Plays answers whose drafted tokens are good at a rate each; `length` stands for the chosen one."""
    draw, policy = random.Random(seed), DraftLength()
    rows = [policy.of_new_row() for _ in rates]
    tokens = seconds = 0.0
    chosen = []
    for _ in range(passes):
        k = policy.choose([(row, 0) for row in rows]) if length is None else length
        chosen.append(k)
        for _ in range(k):
            policy.observe_step(step * (1 + noise * draw.random()))
        if not k:
            policy.observe_step(step)
        took = pass_time(k + 1) * (1 + noise * draw.random())
        policy.base_pass.observe(k + 1, took)
        seconds += k * step + took
        for row, rate in zip(rows, rates, strict=True):
            hits = next((i for i in range(k) if draw.random() >= rate), k)
            row.observe(hits, k)
            policy.acceptance.observe(hits, k)
            tokens += 1 + hits
    return tokens, seconds, chosen


@pytest.mark.parametrize("noise", [0, 0.5])
@pytest.mark.parametrize("rates", [[0.95], [0.8], [0.4], [0.9, 0.5, 0.7, 0.9]])
@pytest.mark.parametrize("pass_time", [FLAT, RISING, STEEP], ids=["flat", "rising", "steep"])
def test_it_is_nearly_as_fast_as_the_best_fixed_length(pass_time, rates, noise):
    tokens, seconds, _ = tokens_and_seconds(rates, pass_time, 0.1, 400, noise)
    speeds = []
    for length in LENGTHS:
        of_length = tokens_and_seconds(rates, pass_time, 0.1, 400, noise, length=length)
        speeds.append(of_length[0] / of_length[1])
    assert tokens / seconds > 0.85 * max(speeds)


@pytest.mark.parametrize("pass_time", [FLAT, RISING, STEEP], ids=["flat", "rising", "steep"])
def test_drafts_that_are_never_good_cost_next_to_nothing(pass_time):
    tokens, seconds, chosen = tokens_and_seconds([0.0], pass_time, 0.07, 400)
    assert tokens == 400 and seconds < 400 * pass_time(1) / 0.95
    assert sum(length > 0 for length in chosen[50:]) < 80


def test_a_nudging_model_that_gets_better_is_found_out():
    policy, acceptance = DraftLength(), Acceptance()
    policy.observe_step(0.05)
    for width in (1, 9):
        policy.base_pass.observe(width, FLAT(width))
    for _ in range(30):
        acceptance.observe(0, 4)
    assert policy.choose([(acceptance, 0)]) == 0
    while policy.choose([(acceptance, 0)]) == 0:
        acceptance.observe(0, 0)
    for _ in range(30):
        acceptance.observe(4, 4)
    assert policy.choose([(acceptance, 0)]) >= 8


def test_what_is_written_already_costs_nothing():
    policy, acceptance = DraftLength(), Acceptance(7, 3)
    policy.observe_step(1.0)
    for width in (1, 9, 17):
        policy.base_pass.observe(width, FLAT(width))
    assert policy.choose([(acceptance, 0)]) < policy.choose([(acceptance, 8)])


def test_times_between_those_known_lie_between_them_and_an_old_one_fades():
    times = PassTime()
    times.observe(1, 1.0)
    times.observe(9, 3.0)
    assert times(1) < times(3) < times(6) < times(9) < times(17)
    for _ in range(2000):
        times.observe(1, 1.0)
    assert times(9) < 1.0


def test_what_is_known_of_two_models_is_kept_as_long_as_they_are():
    chosen = pair("llama", 0, "shared")
    known = draft_length_of(chosen.base, chosen.nudging_model, 2)
    assert draft_length_of(chosen.base, chosen.nudging_model, 2) is known
    assert draft_length_of(chosen.base, chosen.nudging_model, 3) is not known
    assert draft_length_of(chosen.nudging_model, chosen.base, 2) is not known

    class Model:
        pass

    base = Model()
    draft_length_of(base, Model(), 1)
    kept = weakref.ref(base)
    del base
    gc.collect()
    assert kept() is None
