"""Intervals that cover what they should, and a null that holds its level."""

from __future__ import annotations

import numpy as np
import pytest

from ray_dwm.analysis.resampling import (
    LEAST_STEPS,
    Matrix,
    block_draws,
    block_length,
    estimates,
    mean_draws,
    phases_differ,
    stretch,
)


@pytest.mark.parametrize(("steps", "length"), [(1, 1), (3, 1), (8, 2), (27, 3), (64, 4), (1000, 10)])
def test_block_lengths(steps: int, length: int) -> None:
    assert block_length(steps) == length


def test_resamples_are_blocks_of_neighbours() -> None:
    draws = block_draws(27, 200, np.random.default_rng(0))
    assert draws.shape == (200, 27) and (draws.sum(axis=1) == 27).all()
    assert np.abs(draws.mean(axis=0) - 1).max() < 0.35  # around the end: no step is rarer for its place
    # Nine blocks of three: where a step was drawn, so was a neighbour, around the end too.
    alone = (draws > 0) & (np.roll(draws, 1, axis=1) == 0) & (np.roll(draws, -1, axis=1) == 0)
    assert not alone.any()


def test_estimates_by_hand() -> None:
    sums, counts = np.array([[2.0, 0], [4, 3]]), np.array([[1.0, 0], [2, 1]])
    draws = mean_draws(sums, counts, np.array([[2, 0], [0, 2], [1, 1]]))
    np.testing.assert_allclose(draws, [[2, np.nan], [2, 3], [2, 3]])
    first, second = estimates(sums, counts, draws)
    assert (first.value, first.steps, second.value, second.steps) == (2.0, 2, 3.0, 1)
    assert first.low is None and first.high is None  # two steps make no interval
    nothing = estimates(np.zeros((20, 1)), np.zeros((20, 1)), np.full((5, 1), np.nan))[0]
    assert (nothing.value, nothing.low, nothing.steps) == (None, None, 0)


@pytest.mark.parametrize(("steps", "carry", "least"), [(10, 0.0, 0.91), (30, 0.0, 0.92), (100, 0.3, 0.88)])
def test_intervals_cover(steps: int, carry: float, least: float) -> None:
    """95 % intervals of the mean of an AR(1) series around 0.2: dependence takes some of it."""
    rng, hits, turns = np.random.default_rng(1), 0, 300
    for _ in range(turns):
        noise = rng.standard_normal(steps + 20)
        for k in range(1, len(noise)):
            noise[k] += carry * noise[k - 1]
        sums = (0.2 + noise[20:])[:, None]
        counts = np.ones_like(sums)
        found = estimates(sums, counts, mean_draws(sums, counts, block_draws(steps, 300, rng)))[0]
        assert found.low is not None and found.high is not None
        hits += found.low <= 0.2 <= found.high
    assert least <= hits / turns <= 0.98


@pytest.mark.parametrize(("steps", "t"), [(10, 2.776), (27, 2.306), (1000, 1.984)])
def test_the_stretch_of_few_blocks(steps: int, t: float) -> None:
    """t of 4, 8 and 99 degrees of freedom, from tables."""
    blocks = {10: 5, 27: 9, 1000: 100}[steps]
    assert stretch(steps) == pytest.approx((blocks / (blocks - 1)) ** 0.5 * t / 1.96, rel=0.02)


def thirds(steps: int) -> np.ndarray:
    return np.repeat(np.arange(3), steps)


def test_the_statistic_by_hand() -> None:
    """Phase means 1, 1, 4 of values that differ by 1 within a phase: SS_between 12, SS_total 15."""
    values = np.array([0.5, 1.5, 0.5, 1.5, 3.5, 4.5])[:, None]
    found = phases_differ(values, thirds(2), 99, np.random.default_rng(0))
    assert found.shares_F.tolist() == pytest.approx([12 / 13.5])
    assert found.block == 1 and found.permutations == 99


def test_a_planted_difference_is_found_where_it_is() -> None:
    rng = np.random.default_rng(2)
    values = 0.1 * rng.standard_normal((90, 4))
    values[60:, 2] += 0.2
    values[::7, 1] = np.nan  # undefined in some steps
    found = phases_differ(values, thirds(30), 499, rng)
    assert found.p == 1 / 500 == found.p_F[2]
    assert all(found.p_F[[0, 1, 3]] > 0.05)


@pytest.mark.parametrize("seed", range(3))
def test_p_is_uniform_where_phases_do_not_differ(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p = [phases_differ(rng.standard_normal((36, 5)), thirds(12), 59, rng).p for _ in range(100)]
    assert 0.4 < np.mean(p) < 0.6 and np.mean(np.array(p) <= 0.1) < 0.19
    assert min(p) >= 1 / 60


def test_steps_that_are_alike_stay_together() -> None:
    """Eight steps in a row share an effect, as those that one version of a DWM weighs."""
    rng = np.random.default_rng(4)
    series = [np.repeat(rng.standard_normal(9), 8) + 0.5 * rng.standard_normal(72) for _ in range(60)]
    p = {n: [phases_differ(x[:, None], thirds(24), 59, rng, n).p for x in series] for n in (1, 8)}
    assert np.mean(np.array(p[1]) <= 0.1) > 0.25 > 0.2 > np.mean(np.array(p[8]) <= 0.1)
    assert phases_differ(series[0][:, None], thirds(24), 9, rng, 8).block == 8


def test_quantities_that_are_nowhere_defined() -> None:
    values = np.full((3 * LEAST_STEPS, 2), np.nan)
    assert phases_differ(values, thirds(LEAST_STEPS), 19, np.random.default_rng(0)).p == 1.0
    values[:, 0] = 0.3  # and one that never varies
    assert phases_differ(values, thirds(LEAST_STEPS), 19, np.random.default_rng(0)).p_F.tolist() == [1.0, 1.0]


def test_a_matrix_is_symmetric_and_has_no_nan_as_json() -> None:
    matrix = Matrix.empty(2)
    matrix.put(0, 1, 0.5, np.linspace(0, 1, 41))
    matrix.put(1, 1, np.nan, np.full(3, np.nan))
    assert matrix.plain() == {
        "value": [[None, 0.5], [0.5, None]],
        "low": [[None, pytest.approx(0.025)], [pytest.approx(0.025), None]],
        "high": [[None, pytest.approx(0.975)], [pytest.approx(0.975), None]],
    }
