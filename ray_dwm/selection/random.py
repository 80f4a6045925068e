"""Random selection: the control for all others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ray_dwm.data.shards import Rows
from ray_dwm.selection.method import Arrays, RowFunction, Task


def prepare(task: Task) -> RowFunction:
    """Scores that say nothing: uniform on [0, 1), a function of seed and sample id."""
    return RandomScores(task.seed)


@dataclass(frozen=True, slots=True)
class RandomScores:
    """See `prepare`."""

    seed: int

    def __call__(self, rows: Rows) -> Arrays:
        return {"score": uniform(rows.sample_ids, self.seed)}


def uniform(keys: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
    """Numbers on [0, 1) that depend on key and seed alone (the finaliser of SplitMix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = keys.astype(np.uint64) + np.uint64(seed % 2**64 * 0x9E3779B97F4A7C15 % 2**64)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
        x ^= x >> np.uint64(31)
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53
