"""How sure: bootstrap intervals of means over steps, and whether phases differ more than chance lets them.

What varies is which sequences a step's batch happens to hold. The numbers of one step (a correlation within its batch,
a domain's mean weight) are made of weights that depend on each other, so the step is the unit, never the sequence.
Neighbouring steps are weighed by the same DWM, or nearly, and may be alike for that reason. Therefore steps are drawn,
and dealt out anew, in blocks of consecutive ones:

- an interval by the circular block bootstrap (Politis & Romano 1992) with blocks of n^(1/3) steps, the rate of Hall,
  Horowitz & Jing 1995: its percentiles, moved away from the value by what so few blocks make them too narrow by
  (Hesterberg 2015, arXiv 1411.5279, section 5.3);
- the null that phases do not differ by dealing the blocks of all phases out at random, and by the largest of all
  features' statistics (maxT, Westfall & Young 1993), so that looking at many features is paid for.

Both are about this run: how another seed's DWM would differ they do not say.

Legend: S = steps of all phases, n = steps of one, R = resamples, F = quantities, P = phases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from ray_dwm.analysis.ranks import Floats

LEVEL = 0.95
TAILS = ((1 - LEVEL) / 2, (1 + LEVEL) / 2)
LEAST_STEPS = 10
"""Steps below which there is no interval."""
_ROUNDING = 1e-12


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over steps, and the bounds of its interval."""

    value: float | None
    """None where it is not defined in any step."""
    low: float | None
    high: float | None
    """None where it is defined in fewer than LEAST_STEPS."""
    steps: int
    """In which it is defined."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Whether phases differ."""

    p: float
    """Of the largest statistic of all quantities."""
    shares_F: Floats
    """The statistics: the part of the variance over steps that lies between phases; NaN where nothing is defined."""
    p_F: Floats
    """Of each quantity, adjusted for looking at all of them."""
    block: int
    permutations: int


@dataclass(frozen=True, slots=True)
class Matrix:
    """Numbers between phases with the bounds of their intervals, (P, P) each; NaN where there is none."""

    value_PP: Floats
    low_PP: Floats
    high_PP: Floats

    @classmethod
    def empty(cls, phases: int) -> Matrix:
        """To be filled by `put`."""
        return cls(*(np.full((phases, phases), np.nan) for _ in range(3)))

    def put(self, a: int, b: int, value: float, draws_R: Floats) -> None:
        """Put a number and the percentile interval of its resamples in both places."""
        low, high = np.nanquantile(draws_R, TAILS) if not np.isnan(draws_R).all() else (np.nan, np.nan)
        for place in ((a, b), (b, a)):
            self.value_PP[place], self.low_PP[place], self.high_PP[place] = value, low, high

    def plain(self) -> dict[str, list[list[float | None]]]:
        """As JSON has it."""
        of = {"value": self.value_PP, "low": self.low_PP, "high": self.high_PP}
        return {name: [[None if np.isnan(x) else float(x) for x in row] for row in rows] for name, rows in of.items()}


def block_length(steps: int) -> int:
    """Consecutive steps that stay together."""
    return max(1, round(steps ** (1 / 3)))


def block_draws(steps: int, resamples: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """How often each step is in each resample, (R, n): blocks from random starts, around the end, n steps in all."""
    length = block_length(steps)
    starts = rng.integers(steps, size=(resamples, math.ceil(steps / length), 1))
    places_Rn = ((starts + np.arange(length)) % steps).reshape(resamples, -1)[:, :steps]
    flat = places_Rn + steps * np.arange(resamples)[:, None]
    return np.bincount(flat.ravel(), minlength=resamples * steps).reshape(resamples, steps)


def stretch(steps: int) -> float:
    """Factor by which a percentile interval is too narrow: sqrt(m / (m - 1)) t / z with m = n / block_length blocks.

    t is the quantile of Student's distribution with m - 1 degrees of freedom, by its expansion about the normal
    quantile z (Abramowitz & Stegun 26.7.5), which errs by less than 2 % from 4 degrees on.
    """
    blocks = steps / block_length(steps)
    free, z = blocks - 1, NormalDist().inv_cdf(TAILS[1])
    t = z + (z**3 + z) / (4 * free) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * free**2)
    return math.sqrt(blocks / free) * t / z


def mean_draws(sums_nF: Floats, counts_nF: Floats, draws_Rn: NDArray[np.int64]) -> Floats:
    """Means over each resample's steps, (R, F): sums over counts; NaN where a resample has none.

    Args:
        sums_nF: of each step, with 0 where it has none.
        counts_nF: how many the sums are of.
    """
    below_RF = draws_Rn @ counts_nF
    return np.asarray((draws_Rn @ sums_nF) / np.where(below_RF > 0, below_RF, np.nan))


def estimates(sums_nF: Floats, counts_nF: Floats, draws_RF: Floats) -> list[Estimate]:
    """Means of F quantities over the steps of a phase, with intervals from the resamples of `mean_draws`."""
    return [_estimate(*of) for of in zip(sums_nF.T, counts_nF.T, draws_RF.T, strict=True)]


def _estimate(sums_n: Floats, counts_n: Floats, draws_R: Floats) -> Estimate:
    steps = int((counts_n > 0).sum())
    value = float(sums_n.sum() / counts_n.sum()) if steps else None
    if value is None or steps < LEAST_STEPS:
        return Estimate(value, None, None, steps)
    low, high = value + stretch(steps) * (np.nanquantile(draws_R, TAILS) - value)
    return Estimate(value, float(low), float(high), steps)


def phases_differ(
    values_SF: Floats, phases_S: NDArray[np.integer], permutations: int, rng: np.random.Generator, alike: int = 1
) -> Difference:
    """Test whether quantities of steps have the same mean in all phases.

    A quantity's statistic is the part of its variance over steps that lies between phases, SS_between / SS_total. p is
    (1 + k) / (1 + N), with k of N permutations whose largest statistic is at least the observed one.

    Args:
        values_SF: in the order of steps; NaN where a step has none.
        phases_S: the phase of each step, from 0, ascending.
        alike: consecutive steps that have something in common, as a DWM version; they stay together.
    """
    there_SF = ~np.isnan(values_SF)
    means_F = np.nansum(values_SF, axis=0) / np.maximum(there_SF.sum(axis=0), 1)
    centred_SF = np.where(there_SF, values_SF - means_F, 0.0)
    total_F = (centred_SF**2).sum(axis=0)
    members_PS = (phases_S == np.arange(phases_S.max() + 1)[:, None]).astype(np.float64)

    def shares(order_S: NDArray[np.int64]) -> Floats:
        counts_PF = members_PS @ there_SF[order_S]
        between_F = ((members_PS @ centred_SF[order_S]) ** 2 / np.maximum(counts_PF, 1)).sum(axis=0)
        return np.asarray(between_F / np.where(total_F > _ROUNDING, total_F, np.nan))

    length = max(alike, block_length(int(members_PS.sum(axis=1).min())))
    blocks = np.split(np.arange(len(values_SF)), range(length, len(values_SF), length))
    observed_F = shares(np.arange(len(values_SF)))
    if np.isnan(observed_F).all():
        return Difference(1.0, observed_F, np.ones(len(observed_F)), length, permutations)
    largest_N = np.array(
        [
            np.nanmax(shares(np.concatenate([blocks[place] for place in rng.permutation(len(blocks))])))
            for _ in range(permutations)
        ]
    )
    beaten_F = (largest_N[:, None] >= np.nan_to_num(observed_F) - _ROUNDING).sum(axis=0)
    p_F = (1 + beaten_F) / (1 + permutations)
    return Difference(float(p_F.min()), observed_F, p_F, length, permutations)
