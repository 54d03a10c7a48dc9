"""Tests the draft length on simulated machines and answers: it finds the best length, and 0 if no draft pays."""

import copy
import gc
import random
import weakref

import pytest
from running import inputs_of
from tiny import pair, prompts

import nudging_hf
from nudging_hf.core.draft_policy import (
    MAX_DRAFT_TOKENS,
    Acceptance,
    DecayedRate,
    DraftLength,
    DraftProgress,
    GuessLength,
    PassTime,
    Plan,
    borrowed_draft_length,
)

# The seconds of a pass by its tokens, for a memory-bound device and for two compute-bound ones.
FLAT, RISING, STEEP = (lambda n: 1 + 0.01 * n), (lambda n: 1 + 0.1 * n), (lambda n: 0.2 + 0.8 * n)


def uneven(n):
    """The seconds of a pass on a device that is slow for two and three tokens, and then hardly slower for many."""
    return n if n < 4 else 3.2 + 0.04 * n


SURE = (0.2, 0.6, 0.9, 0.97, 0.9995)


def tokens_and_seconds(chances, pass_time, step, passes, noise=0.0, length=None, seed=0, forced=0):
    """Simulates answers of several rows.

    Args:
        chances: for each row, the probability that a drafted token is accepted, by the nudging model's top-1
            probability. All these top-1 probabilities are equally frequent.
        pass_time: the seconds of a pass of the base, as a function of its tokens.
        step: the seconds of a step of the nudging model.
        passes: how many passes of the base to simulate.
        noise: the largest relative noise of the seconds.
        length: a fixed draft length, or `None` to let the policy choose.
        forced: how many steps all rows wait for after each pass because another row must write.

    Returns:
        The accepted tokens, the seconds, and the draft length of each pass.
    """
    draw, policy = random.Random(seed), DraftLength()
    written: list[list[float]] = [[] for _ in chances]
    tokens = seconds = 0.0
    chosen = []
    while len(chosen) < passes:
        plan = (
            policy.choose([DraftProgress(sure, MAX_DRAFT_TOKENS) for sure in written])
            if length is None
            else Plan(length, length)
        )
        if short := [row for row, sure in enumerate(written) if len(sure) < plan.write]:
            took = step * (1 + noise * draw.random())
            policy.observe_step(len(chances), took, 1, drafts=True)
            seconds += took
            for row in short:
                written[row].append(draw.choice(list(chances[row])))
            continue
        took = pass_time(len(chances) * (plan.read + 1)) * (1 + noise * draw.random())
        policy.observe_pass(len(chances) * (plan.read + 1), took)
        seconds += took
        chosen.append(plan.read)
        before = tokens
        for row, sure in enumerate(written):
            draft = sure[: plan.read]
            hits = next((i for i, p in enumerate(draft) if draw.random() >= chances[row][p]), len(draft))
            policy.acceptance.observe(draft, hits)
            tokens += 1 + hits
            sure.clear()
        policy.observe_accepted(int(tokens - before))
        for _ in range(forced):
            policy.observe_step(len(chances), step, 1, drafts=False)
            seconds += step
    return tokens, seconds, chosen


def progress(top1_probs):
    """A row whose nudging model may write more."""
    return DraftProgress(top1_probs, MAX_DRAFT_TOKENS)


def finished(top1_probs):
    """A row whose nudging model may write no more."""
    return DraftProgress(top1_probs, len(top1_probs))


UNINFORMATIVE = dict.fromkeys(SURE, 0.8)  # The top-1 probability says nothing about acceptance.
CALIBRATED = {p: p for p in SURE}
TWO_KINDS = {0.2: 0.1, 0.9995: 1.0}


@pytest.mark.parametrize("noise", [0, 0.5])
@pytest.mark.parametrize(
    "chances", [[UNINFORMATIVE], [CALIBRATED], [TWO_KINDS], [TWO_KINDS, CALIBRATED, UNINFORMATIVE]]
)
@pytest.mark.parametrize("pass_time", [FLAT, RISING, STEEP], ids=["flat", "rising", "steep"])
def test_it_is_about_as_fast_as_the_best_fixed_length(pass_time, chances, noise):
    tokens, seconds, _ = tokens_and_seconds(chances, pass_time, 0.1, 400, noise)
    speeds = []
    for length in (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, MAX_DRAFT_TOKENS):
        of_length = tokens_and_seconds(chances, pass_time, 0.1, 400, noise, length)
        speeds.append(of_length[0] / of_length[1])
    assert tokens / seconds > 0.87 * max(speeds)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("pass_time", [FLAT, RISING], ids=["flat", "rising"])
def test_passes_that_other_work_holds_up_do_not_end_drafts(pass_time, seed):
    draw = random.Random(seed)

    def held_up(n):
        return pass_time(n) * (draw.choice([5, 30, 100]) if draw.random() < 0.05 else 1)

    tokens, _, _ = tokens_and_seconds([UNINFORMATIVE] * 4, held_up, 0.1, 300, seed=seed)
    quiet_tokens, _, _ = tokens_and_seconds([UNINFORMATIVE] * 4, pass_time, 0.1, 300, seed=seed)
    assert tokens > 0.85 * quiet_tokens


def test_rows_that_wait_for_other_rows_draft_farther():
    def speed(forced, **kwargs):
        tokens, seconds, chosen = tokens_and_seconds([UNINFORMATIVE] * 8, RISING, 0.1, 400, forced=forced, **kwargs)
        return tokens / seconds, sum(chosen)

    assert speed(forced=100)[1] > 1.3 * speed(forced=0)[1]
    assert speed(forced=100)[0] > 0.95 * max(speed(forced=100, length=length)[0] for length in (4, 6, 8, 12))


def test_using_the_nudging_model_s_probabilities_beats_any_fixed_length():
    tokens, seconds, _ = tokens_and_seconds([TWO_KINDS], RISING, 0.1, 400)
    fixed = [tokens_and_seconds([TWO_KINDS], RISING, 0.1, 400, length=length)[:2] for length in (0, 1, 2, 3, 4, 6, 8)]
    assert tokens / seconds > 1.1 * max(n / s for n, s in fixed)


@pytest.mark.parametrize("sure", [0.6, 0.9995])
@pytest.mark.parametrize("pass_time", [FLAT, RISING, STEEP], ids=["flat", "rising", "steep"])
def test_drafts_that_are_never_good_cost_next_to_nothing(pass_time, sure):
    tokens, seconds, chosen = tokens_and_seconds([{sure: 0.0}], pass_time, 0.07, 400)
    assert tokens == 400 and seconds < 400 * pass_time(1) / 0.95
    assert sum(length > 0 for length in chosen[50:]) < 80


@pytest.mark.parametrize("chance", [0.0, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("pass_time", [STEEP, uneven])
def test_drafts_that_do_not_pay_cost_a_small_share_of_the_time(pass_time, chance):
    tokens, seconds, _ = tokens_and_seconds([dict.fromkeys(SURE, chance)], pass_time, 0.06, 1200, noise=0.1)
    alone = tokens_and_seconds([UNINFORMATIVE], pass_time, 0.06, 1200, noise=0.1, length=0)
    assert tokens / seconds > 0.95 * alone[0] / alone[1]


@pytest.fixture
def timed():
    """A policy that has observed passes and steps."""
    policy = DraftLength()
    for tokens in (9, 1, 17, 33):
        policy.observe_pass(tokens, RISING(tokens))
    policy.observe_step(1, 0.05, 1, drafts=True)
    policy.choose([progress([])])  # The second pass drafts nothing, to learn what that costs.
    return policy


def test_drafts_grow_when_the_nudging_model_improves(timed):
    def chosen():
        return timed.choose([progress([0.97] * 8)]).read

    for _ in range(60):
        timed.acceptance.observe([0.97] * 4, 0)
    assert chosen() == 0
    while chosen() == 0:
        timed.acceptance.observe([], 0)
    for _ in range(60):
        timed.acceptance.observe([0.97] * 4, 4)
    assert chosen() >= 8


def test_lengths_chosen_by_others_do_not_change_the_measured_pace(timed):
    other = copy.deepcopy(timed)
    for policy, tokens in ((timed, 1), (other, 1000)):
        for _ in range(50):
            policy.observe_pass(17, RISING(17))
            policy.observe_accepted(tokens)
    assert timed.choose([progress([0.9] * 20)]) == other.choose([progress([0.9] * 20)])


def test_the_time_of_prompts_does_not_affect_drafts(timed):
    rows = [progress([0.97] * 8)]
    reads = timed.choose(rows).read
    for _ in range(20):
        timed.choose(rows)
        timed.observe_pass(4000, RISING(4000), reads_prompts=True)
        timed.observe_accepted(1)
    assert timed.choose(rows).read == reads > 0


def test_a_new_answer_is_not_charged_for_the_last_pass_of_the_previous_one(monkeypatch):
    calls = []
    monkeypatch.setattr(DraftLength, "observe_pass", lambda self, tokens, seconds, reads_prompts: calls.append("pass"))
    monkeypatch.setattr(DraftLength, "observe_accepted", lambda self, tokens: calls.append("accepted"))
    chosen = pair("llama", 1, "shared")
    inputs = inputs_of(chosen, *prompts(chosen, 1, 0))
    for _ in range(2):
        calls.clear()
        nudging_hf.generate(chosen.base, **inputs, nudge_threshold=0.4, num_draft_tokens=4, max_new_tokens=24)
        assert calls[:3] == ["pass", "accepted", "pass"]


def test_drafts_go_on_when_the_achieved_pace_exceeds_the_predicted_one(timed):
    rows = [finished([0.97] * 20)]
    reads = timed.choose(rows).read
    for _ in range(30):
        timed.choose(rows)
        timed.observe_pass(17, RISING(17))
        timed.observe_accepted(100)
    assert timed.choose(rows).read > reads / 2 > 0


def test_an_unsure_model_is_not_drafted_as_far(timed):
    for sure, good in [(0.2, 0), (0.9995, 1)] * 40:
        timed.acceptance.observe([sure], good)
    reads = [timed.choose([finished([0.9995] * n + [0.2] * 8)]).read for n in (0, 3, 8)]
    assert reads == [0, 3, 8]


def test_tokens_that_are_already_written_cost_no_step(timed):
    slow = GuessLength()
    slow.observe_pass(1, 3.0, 1)
    timed.guesses = slow
    assert timed.choose([progress([])]) == Plan(0, 0)
    assert timed.choose([progress([0.97] * 6)]) == Plan(0, 6)


def test_a_step_that_is_made_for_others_is_free(timed):
    for _ in range(30):
        timed.acceptance.observe([0.6], 1)
        timed.acceptance.observe([0.6], 0)
    rows = [progress([])]
    assert timed.choose(rows, steps_are_free=True).write > timed.choose(rows).write


def test_a_row_that_may_not_write_on_asks_for_no_step(timed):
    assert timed.choose([finished([0.9995] * 3)]) == Plan(0, 3)


def test_unknown_times_are_interpolated_and_old_times_decay():
    times = PassTime()
    times.observe(1, 1.0)
    times.observe(9, 3.0)
    assert times(1) < times(3) < times(6) < times(9) < times(17)
    for _ in range(2000):
        times.observe(1, 1.0)
    assert times(9) < 1.0


def test_guesses_grow_while_they_are_right():
    always, never = GuessLength(), GuessLength()
    for guesses in (always, never):
        for tokens in (1, 9):
            guesses.observe_pass(tokens, RISING(tokens), 1)
    for _ in range(200):
        always.observe(8, 8)
        never.observe(0, 8)
    assert always.choose(1) >= 12 and never.choose(1) == 0
    for _ in range(20000):  # At some point, guesses are tried again.
        if never.choose(1):
            break
    else:
        pytest.fail("Guesses were never tried again.")


def test_a_rate_follows_recent_observations():
    rate = DecayedRate(0.5)
    for hit, miss in [(1, 0)] * 300:
        rate.decay(1)
        rate.observe(hit, miss)
    assert rate.value > 0.97
    for hit, miss in [(0, 1)] * 300:
        rate.decay(1)
        rate.observe(hit, miss)
    assert rate.value < 0.1


def test_one_answer_s_rates_of_unsure_tokens_decay_over_later_answers():
    acceptance = Acceptance()
    first = acceptance.survival([0.2])
    for _ in range(30):
        acceptance.observe([0.2], 0)
    wrong = acceptance.survival([0.2])
    assert wrong[0] < 0.1 < first[0]
    for _ in range(20):
        acceptance.observe([0.9995] * 20, 20)
    assert acceptance.survival([0.2])[0] > 0.8 * first[0]


def policy_for(*pair_and_setting):
    """The policy that a call gets if no other call runs."""
    with borrowed_draft_length(*pair_and_setting) as policy:
        return policy


def test_a_pair_s_policy_lives_as_long_as_its_models():
    chosen = pair("llama", 0, "shared")
    known = policy_for(chosen.base, chosen.nudging_model, 2)
    assert policy_for(chosen.base, chosen.nudging_model, 2) is known
    assert policy_for(chosen.base, chosen.nudging_model, 3) is not known
    assert policy_for(chosen.nudging_model, chosen.base, 2) is not known

    base, nudging_model = Model(), Model()
    policy_for(base, nudging_model, 1)
    kept = [weakref.ref(base), weakref.ref(nudging_model)]
    del base, nudging_model
    gc.collect()
    assert [model() for model in kept] == [None, None]


class Model:
    pass


def test_concurrent_calls_use_separate_policies_and_the_second_starts_from_a_copy(timed):
    base, nudging_model = Model(), Model()
    with borrowed_draft_length(base, nudging_model, 1) as first:
        vars(first).update(vars(copy.deepcopy(timed)))
    rows = [progress([0.97] * 8)]
    with borrowed_draft_length(base, nudging_model, 1) as again:
        assert again is first
        with borrowed_draft_length(base, nudging_model, 1) as second:
            assert second is not first
            assert second.choose(rows) == first.choose(rows) != DraftLength().choose(rows)
            for _ in range(60):
                second.acceptance.observe([0.97] * 4, 0)
            assert second.choose(rows) != first.choose(rows)
    # Both policies are available to the next two calls.
    with borrowed_draft_length(base, nudging_model, 1) as one, borrowed_draft_length(base, nudging_model, 1) as two:
        assert {id(one), id(two)} == {id(first), id(second)}


def test_a_call_that_fails_gives_its_policy_back():
    base, nudging_model = Model(), Model()
    with pytest.raises(KeyboardInterrupt), borrowed_draft_length(base, nudging_model, 1) as policy:
        raise KeyboardInterrupt
    assert policy_for(base, nudging_model, 1) is policy


def test_reading_again_makes_drafts_shorter():
    """A base with a recurrent state reads accepted tokens again after a rejected draft, which takes time."""
    policy = DraftLength()
    policy.choose([progress([])])
    for tokens in (1, 2, 4, 8, 16, 32, 64):
        for _ in range(40):
            policy.observe_pass(tokens, 0.9 + 0.1 * tokens)
    policy.guesses.observe_pass(1, 0.01, 1.0)
    for _ in range(400):
        policy.acceptance.observe([0.9] * 8, 5)
    policy.choose([progress([])])
    plain = policy.choose([progress([0.9] * 12)]).read
    again = policy.choose([progress([0.9] * 12)], reread=0).read
    assert 0 < again < plain
