"""Tests the intervals: against the equations that define them, and by how often they hold what they should."""

from itertools import product
from math import comb, factorial, sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nudging_hf.study.intervals import mean, paired_difference, wilson

COUNTS = st.tuples(*[st.integers(0, 60)] * 4).filter(any)


@given(st.integers(1, 500), st.data())
def test_the_ends_of_a_share_s_interval_are_one_score_test_away(whole, data):
    part = data.draw(st.integers(0, whole))
    low, high = wilson(part, whole)
    assert 0 <= low <= part / whole <= high <= 1 and high - low > 0
    for end in (low, high):
        if 0 < end < 1:
            assert abs(part / whole - end) == pytest.approx(1.959964 * sqrt(end * (1 - end) / whole))


def test_the_interval_of_none_right_has_a_width():
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert wilson(10, 10) == pytest.approx((0.7225, 1), abs=1e-4)


@given(COUNTS)
def test_a_difference_is_inside_its_interval_which_has_a_width_and_turns_with_the_two(counts):
    both, one, other, neither = counts
    low, high = paired_difference(both, one, other, neither)
    assert -1 <= low <= (one - other) / sum(counts) <= high <= 1 and high - low > 0
    assert paired_difference(both, other, one, neither) == pytest.approx((-high, -low))
    assert paired_difference(neither, one, other, both) == pytest.approx((low, high))


@pytest.mark.parametrize("shares", [(0.3, 0.3, 0.1, 0.3), (0.8, 0.05, 0.05, 0.1), (0.05, 0.85, 0.02, 0.08)])
def test_the_interval_of_a_difference_holds_it_about_19_times_in_20(shares):
    whole, held = 14, 0.0
    for a, b, c in product(range(whole + 1), repeat=3):
        if a + b + c <= whole:
            counts = (a, b, c, whole - a - b - c)
            ways = factorial(whole)
            for count in counts:
                ways //= factorial(count)
            chance = ways
            for share, count in zip(shares, counts, strict=True):
                chance *= share**count
            low, high = paired_difference(*counts)
            held += chance * (low <= shares[1] - shares[2] <= high)
    assert held > 0.93


def test_equal_contestants_differ_by_chance_in_few_questions():
    """All of `n` questions that differ favour one: the interval excludes 0 about where the exact sign test does."""
    for n in range(1, 12):
        excludes = paired_difference(10, n, 0, 10)[0] > 0
        assert not excludes or 2 * comb(n, 0) / 2**n < 0.13


def test_a_mean_of_one_value_has_no_interval():
    assert mean([3.0]) == (3.0, None)
    average, (low, high) = mean([1.0, 2.0, 3.0])
    assert average == 2 and (low, high) == pytest.approx((2 - 1.959964 / sqrt(3), 2 + 1.959964 / sqrt(3)))
