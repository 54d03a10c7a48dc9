"""How far a share and a difference of shares may be off. It knows counts, never what was counted."""

from __future__ import annotations

from math import sqrt

Interval = tuple[float, float]

_Z = 1.959964  # The standard normal quantile of a two-sided interval of 95 %.


def wilson(part: float, whole: int) -> Interval:
    """The 95 % interval of a share, which has a width at 0 and at 1 too.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference" (1927).

    Raises:
        ZeroDivisionError: for a share of nothing.
    """
    share, z2 = part / whole, _Z * _Z
    middle = share + z2 / (2 * whole)
    reach = _Z * sqrt(share * (1 - share) / whole + z2 / (4 * whole * whole))
    scale = 1 + z2 / whole
    # Rounding may not move the end of an interval past the share itself.
    return min(share, max(0.0, (middle - reach) / scale)), max(share, min(1.0, (middle + reach) / scale))


def paired_difference(both: int, only_one: int, only_other: int, neither: int) -> Interval:
    """The 95 % interval of the difference of two shares of the same questions.

    Source: method 10 of Newcombe, "Improved confidence intervals for the difference between binomial proportions
    based on paired data" (Statistics in Medicine 17, 1998). The intervals of [`wilson`] are combined, with the
    correlation of the two.

    Args:
        both, only_one, only_other, neither: how many questions both have right, and so on; not all zero.
    """
    whole = both + only_one + only_other + neither
    one, other = both + only_one, both + only_other
    (low_one, high_one), (low_other, high_other) = wilson(one, whole), wilson(other, whole)
    share_one, share_other = one / whole, other / whole
    spread = one * (whole - one) * other * (whole - other)
    together = both * neither - only_one * only_other
    # Newcombe's correction for continuity lessens a correlation that is positive.
    corrected = max(0.0, together - whole / 2) if together > 0 else float(together)
    phi = corrected / sqrt(spread) if spread else 0.0

    def reach(mine: float, its: float) -> float:
        return sqrt(max(0.0, mine * mine - 2 * phi * mine * its + its * its))

    difference = (only_one - only_other) / whole
    below = reach(share_one - low_one, high_other - share_other)
    above = reach(high_one - share_one, share_other - low_other)
    return difference - below, difference + above


def mean(values: list[float]) -> tuple[float, Interval | None]:
    """The mean of some values and its 95 % interval by the normal approximation; `None` for fewer than two."""
    average = sum(values) / len(values)
    if len(values) < 2:
        return average, None
    variance = sum((value - average) ** 2 for value in values) / (len(values) - 1)
    reach = _Z * sqrt(variance / len(values))
    return average, (average - reach, average + reach)
