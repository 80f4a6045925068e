"""From scores to rows: quotas by hand, and the odds of Gumbel's trick."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from ray_dwm.selection.choose import drawn, highest, quotas
from ray_dwm.selection.method import Scored


def task(seed: int = 0, stratified: bool = False, temperature: float = 1.0, domains: int = 2) -> Any:
    return SimpleNamespace(
        seed=seed,
        options=SimpleNamespace(stratified=stratified, temperature=temperature),
        pool=SimpleNamespace(domains=dict.fromkeys(map(str, range(domains)))),
    )


def scored(scores: list[float], domains: list[int] | None = None) -> Scored:
    return Scored(np.array(scores), np.array(domains or [0] * len(scores), dtype=np.int32))


@pytest.mark.parametrize(
    ("proportions", "count", "available", "expected"),
    [
        ([0.5, 0.5], 4, [10, 10], [2, 2]),
        ([0.5, 0.3, 0.2], 10, [100, 100, 100], [5, 3, 2]),
        ([1 / 3, 1 / 3, 1 / 3], 10, [9, 9, 9], [4, 3, 3]),  # equal fractions: the first wins
        ([0.9, 0.1], 10, [3, 100], [3, 7]),  # what a domain lacks goes to the others
        ([1.0, 0.0], 5, [2, 100], [2, 3]),  # even to one of proportion 0, where nothing else is left
        ([0.25, 0.75], 3, [0, 3], [0, 3]),
        ([0.6, 0.2, 0.2], 20, [1, 6, 100], [1, 6, 13]),  # twice: 6 of the 9.5 that the second would get
        # All of a pool by its own shares: what rounding leaves, 2e-9 of a row, has nowhere to go.
        ([0.5630090433559134, 0.4133953054732917, 0.02359565117079499], 10575720, [5954226, 4371953, 249541], None),
    ],
)
def test_quotas(proportions: list[float], count: int, available: list[int], expected: list[int] | None) -> None:
    found = quotas(np.array(proportions), count, np.array(available))
    assert found.tolist() == (expected or available)


def test_quotas_sum_and_fit_in_random_cases() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        available = rng.integers(0, 20, size=6)
        count = int(rng.integers(0, available.sum() + 1))
        found = quotas(rng.dirichlet(np.full(6, 0.3)), count, available)
        assert found.sum() == count and (found <= available).all() and (found >= 0).all()


def test_quotas_of_a_whole_large_pool() -> None:
    """At millions of rows sums of shares are off by more than any fixed tolerance."""
    rng = np.random.default_rng(0)
    for _ in range(300):
        available = rng.integers(1, 10**6, size=60)
        shares = available / available.sum()
        assert (quotas(shares, int(available.sum()), available) == available).all()
        count = int(available.sum() * 0.37)
        found = quotas(shares, count, available)
        assert found.sum() == count and np.abs(found - shares * count).max() < 1.01


def test_highest_takes_the_earlier_of_equals_and_returns_rows_in_order() -> None:
    assert highest(task(), scored([1, 3, 2, 3, 2]), 3).tolist() == [1, 2, 3]


def test_stratified_keeps_the_pools_shares() -> None:
    pool = scored([9, 8, 7, 6, 5, 4, 1, 2], [0, 0, 0, 0, 0, 0, 1, 1])
    assert highest(task(), pool, 4).tolist() == [0, 1, 2, 3]
    assert highest(task(stratified=True), pool, 4).tolist() == [0, 1, 2, 7]


def test_drawn_has_the_odds_of_the_scores() -> None:
    """One of two rows whose scores differ by log 4 is drawn with odds 4 to 1; at temperature 2 with 2 to 1."""
    pool = scored([0.0, np.log(4.0)])
    for temperature, expected in ((1.0, 0.8), (2.0, 2 / 3)):
        wins = np.mean([drawn(task(seed, temperature=temperature), pool, 1)[0] for seed in range(4000)])
        assert abs(wins - expected) < 4 * np.sqrt(expected * (1 - expected) / 4000)
    assert drawn(task(3), pool, 1).tolist() == drawn(task(3), pool, 1).tolist()


def test_drawn_without_replacement_by_hand() -> None:
    """Two of weights 1, 2 and 3, one after the other: 1/6 2/5 + 2/6 1/4 for the first two, and so on."""
    pool = scored(np.log([1.0, 2.0, 3.0]).tolist())
    pairs = [tuple(drawn(task(seed), pool, 2).tolist()) for seed in range(4000)]
    for pair, expected in {(0, 1): 9 / 60, (0, 2): 16 / 60, (1, 2): 35 / 60}.items():
        assert abs(pairs.count(pair) / 4000 - expected) < 4 * np.sqrt(expected * (1 - expected) / 4000)
