"""Means over seeds with 95 % intervals, paired tests, ratios, and what many comparisons at once ask for.

Seeds are the sample: runs of one seed share their data order, so methods are compared within seeds. An interval needs
at least two of them; where there are fewer, there is none, and nothing is made up in its place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean, stdev

CONFIDENCE = 0.95
_MOST_SIGNS = 16
"""Pairs up to which every assignment of signs is tried: 65,536 of them."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean over n values and its 95 % interval, by Student's t; no bounds where n is 1."""

    n: int
    mean: float
    low: float | None
    high: float | None

    @property
    def half(self) -> float | None:
        """Half of the interval's width, where it is symmetric about the mean."""
        return None if self.high is None else self.high - self.mean

    def excludes(self, value: float) -> bool:
        """Whether there is an interval, and the value lies outside."""
        return self.low is not None and self.high is not None and not self.low <= value <= self.high


@dataclass(frozen=True, slots=True)
class Paired:
    """A difference within seeds: its interval and the two-sided p of two tests that it is 0."""

    interval: Interval
    p_t: float | None
    """Paired t test, which takes the differences to be normal; None for a single pair."""
    p_signs: float | None
    """Exact sign-flip permutation test, which takes them to be symmetric; None for very many pairs. With n pairs it
    cannot be less than 2 / 2^n: 0.25 for three seeds."""


def t_cdf(t: float, freedom: int) -> float:
    """P(T <= t) of Student's t with a whole number of degrees of freedom, in closed form.

    Source: Abramowitz and Stegun 1964, 26.7.3 and 26.7.4.
    """
    angle = math.atan(abs(t) / math.sqrt(freedom))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = freedom % 2
    term, total = (math.cos(angle), 0.0) if odd else (1.0, 0.0)
    for k in range((freedom - odd) // 2):
        total += term
        term *= square * ((2 * k + 2) / (2 * k + 3) if odd else (2 * k + 1) / (2 * k + 2))
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return (1 + math.copysign(inside, t)) / 2


def t_quantile(p: float, freedom: int) -> float:
    """The t below which a part p >= 0.5 of the distribution lies, by bisection."""
    low, high = 0.0, 1.0
    while t_cdf(high, freedom) < p:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, freedom) < p else (low, middle)
    return (low + high) / 2


def interval(values: Sequence[float]) -> Interval:
    """Mean and 95 % t interval of at least one value."""
    mean, n = fmean(values), len(values)
    if n < 2:
        return Interval(n, mean, None, None)
    half = t_quantile((1 + CONFIDENCE) / 2, n - 1) * stdev(values) / math.sqrt(n)
    return Interval(n, mean, mean - half, mean + half)


def ratio(values: Sequence[float]) -> Interval:
    """Geometric mean and 95 % interval of positive ratios: that of their logarithms, so it is not symmetric."""
    logs = interval([math.log(value) for value in values])
    bounds = (None if bound is None else math.exp(bound) for bound in (logs.low, logs.high))
    return Interval(logs.n, math.exp(logs.mean), *bounds)


def paired(differences: Sequence[float]) -> Paired:
    """What the differences within at least one seed say of their mean."""
    found, n = interval(differences), len(differences)
    p_signs = _sign_flip(differences) if n <= _MOST_SIGNS else None
    if n < 2:
        return Paired(found, None, p_signs)
    error = stdev(differences) / math.sqrt(n)
    if error == 0:
        return Paired(found, 1.0 if found.mean == 0 else 0.0, p_signs)
    return Paired(found, 2 * (1 - t_cdf(abs(found.mean) / error, n - 1)), p_signs)


def _sign_flip(differences: Sequence[float]) -> float:
    """Part of all assignments of signs whose mean is as far from 0 as the observed one's."""
    rounding = 1e-12 * math.fsum(map(abs, differences))
    observed = abs(math.fsum(differences)) - rounding
    flipped = product(*((d, -d) for d in differences))
    return sum(abs(math.fsum(each)) >= observed for each in flipped) / 2 ** len(differences)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p values adjusted for their number m (Holm 1979): the k-th smallest times m - k + 1, never falling, at most 1."""
    adjusted, least = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda key: p_values[key])):
        least = max(least, min(1.0, p_values[name] * (len(p_values) - rank)))
        adjusted[name] = least
    return adjusted


def read_at(x: Sequence[float], y: Sequence[float], at: float) -> float:
    """A curve's value between its points by a straight line; before its first and after its last point, theirs."""
    if at <= x[0]:
        return y[0]
    for k in range(1, len(x)):
        if at <= x[k]:
            share = (at - x[k - 1]) / (x[k] - x[k - 1])
            return y[k - 1] + share * (y[k] - y[k - 1])
    return y[-1]
