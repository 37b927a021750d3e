"""Means over seeds with their 95 % intervals, and paired differences.

With n values of mean m and standard deviation s (n - 1 in its denominator) the interval is m +- t s / sqrt(n), where t is
the 0.975 quantile of Student's distribution with n - 1 degrees of freedom. It assumes that the values are independent and
about normal; two rows of one seed share data and teachers, so that they are compared by the differences seed by seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from statistics import fmean, stdev
from typing import NamedTuple


class Estimate(NamedTuple):
    """A mean, half the width of its 95 % interval (None for a single value), and of how many values."""

    mean: float
    interval: float | None
    n: int


def estimate(values: Sequence[float]) -> Estimate | None:
    """Mean and interval; None for no values."""
    if not values:
        return None
    n = len(values)
    interval = t_quantile(n - 1) * stdev(values) / math.sqrt(n) if n > 1 else None
    return Estimate(fmean(values), interval, n)


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Estimate | None:
    """The mean of ours less theirs over the seeds that both have; None where there is no such seed."""
    return estimate([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])


# Ours stays: of what the engine needs anyway only scipy has this quantile, and scipy is no dependency (100 MB for one number).
@cache
def t_quantile(df: int, level: float = 0.95) -> float:
    """t with P(|T| <= t) = level for `df` whole degrees of freedom, to 1e-9 relative; bisection over theta = atan(t / sqrt(df))."""
    low, high = 0.0, math.pi / 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, df) < level else (low, middle)
    return math.sqrt(df) * math.tan((low + high) / 2)


def _within(theta: float, df: int) -> float:
    """P(|T| <= sqrt(df) tan theta): the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = df % 2
    term = total = (cosine if odd else 1.0) if df > 1 else 0.0
    for i in range(3 if odd else 2, df - 1, 2):
        term *= cosine * cosine * (i - 1) / i
        total += term
    return 2 / math.pi * (theta + sine * total) if odd else sine * total
