"""Ranks and rank correlations by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ray_dwm.analysis.ranks import explained, ranks, spearman, within_batches, without_means


def floats(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float64)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([10, 30, 20], [1, 3, 2]),
        ([5, 5, 1], [2.5, 2.5, 1]),
        ([7, 7, 7, 7], [2.5] * 4),
        ([2, 1, 2, 1, 3], [3.5, 1.5, 3.5, 1.5, 5]),
    ],
)
def test_ties_share_their_mean_rank(values: list[float], expected: list[float]) -> None:
    assert ranks(floats(*values)).tolist() == expected
    assert ranks(np.array([values, values[::-1]])).tolist() == [expected, expected[::-1]]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 4000], 1.0),  # monotone, not linear
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        # Without ties 1 - 6 sum d^2 / (n (n^2 - 1)): d = (-1, 1, 0, 0, 0), and d = (-2, 1, 1, 0).
        ([1, 2, 3, 4, 5], [2, 1, 3, 4, 5], 1 - 6 * 2 / (5 * 24)),
        ([1, 2, 3, 4], [3, 1, 2, 4], 1 - 6 * 6 / (4 * 15)),
        # Ranks (1.5, 1.5, 3) against (1, 2, 3): Pearson's of these is 1.5 / sqrt(1.5 * 2).
        ([0, 0, 1], [1, 2, 3], 1.5 / math.sqrt(3)),
    ],
)
def test_spearman_by_hand(a: list[float], b: list[float], expected: float) -> None:
    assert float(spearman(floats(*a), floats(*b))) == pytest.approx(expected, abs=1e-12)


def test_a_constant_list_has_no_correlation() -> None:
    assert np.isnan(spearman(floats(1, 1, 1), floats(1, 2, 3)))


def test_batches_are_compared_within_themselves_only() -> None:
    """The second batch has all the larger weights and all the smaller values: pooled that would be negative."""
    weights, values = np.array([[1, 2, 3], [11, 12, 13]]), np.array([[100, 101, 102], [1, 2, 3]])
    assert within_batches(weights.astype(float), values).tolist() == [1.0, 1.0]
    assert float(spearman(weights.ravel(), values.ravel())) < 0


def test_within_groups_what_is_between_them_does_not_count() -> None:
    """Group 1 has the larger weights and values, within both groups the order is opposite."""
    weights, values = np.array([[1.0, 2, 11, 12]]), np.array([[2.0, 1, 22, 21]])
    groups = np.array([[0, 0, 1, 1]])
    # d = (-1, 1, -1, 1) of the ranks
    assert within_batches(weights, values).tolist() == pytest.approx([1 - 6 * 4 / (4 * 15)])
    assert within_batches(weights, values, groups).tolist() == pytest.approx([-1.0])
    assert np.isnan(within_batches(weights, np.array([[1.0, 1, 2, 2]]), groups)).all()
    assert without_means(np.array([[1.0, 3, 5], [2, 4, 9]]), np.array([[0, 0, 7], [7, 0, 7]])).tolist() == [
        [-1.0, 1, 0],
        [-3.5, 0, 3.5],
    ]


def test_the_part_that_groups_explain() -> None:
    weights = np.array([[1.0, 2, 3, 4]] * 4)
    groups = np.array([[0, 0, 1, 1], [0, 1, 0, 1], [0, 0, 0, 0], [0, 1, 2, 3]])
    # SS_total = 5; within (1, 2), (3, 4) it is 1, within (1, 3), (2, 4) it is 4. (r - 1) / (r - k) = 3 / 2.
    expected = [1 - 1 / 5 * 3 / 2, 1 - 4 / 5 * 3 / 2, math.nan, math.nan]
    assert explained(weights, groups).tolist() == pytest.approx(expected, nan_ok=True)


def test_groups_of_equals_explain_nothing_on_average() -> None:
    rng = np.random.default_rng(0)
    weights, groups = rng.random((4000, 12)), rng.integers(3, size=(4000, 12))
    assert abs(np.nanmean(explained(weights, groups))) < 0.01  # eta squared would be 2 / 11
