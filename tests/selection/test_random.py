"""Random scores are uniform, and a function of seed and sample id."""

from __future__ import annotations

import numpy as np

from ray_dwm.selection.random import uniform


def test_uniform_on_the_unit_interval() -> None:
    numbers = uniform(np.arange(200_000), seed=7)
    assert numbers.min() >= 0 and numbers.max() < 1
    counts = np.histogram(numbers, bins=50, range=(0, 1))[0]
    assert ((counts - 4000) ** 2 / 4000).sum() < 85  # chi^2 of 49 degrees of freedom: 85 is its 99.9 % quantile
    neighbours = np.corrcoef(numbers[:-1], numbers[1:])[0, 1]
    assert abs(neighbours) < 0.01


def test_depends_on_seed_and_id_alone() -> None:
    ids = np.array([5, 2**40, 17])
    assert np.array_equal(uniform(ids, 1)[::-1], uniform(ids[::-1], 1))
    assert not np.intersect1d(uniform(ids, 1), uniform(ids, 2)).size
    assert uniform(ids, 2**63 - 1).shape == (3,)
