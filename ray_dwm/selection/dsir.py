"""Data Selection via Importance Resampling: likeness to the target by bags of hashed n-grams.

Xie et al. 2023 (arXiv 2302.03169), section 3. The log importance ratio of a sequence with n-gram counts c is
sum_j c_j (log p_target(j) - log p_pool(j)); rows are drawn in proportion to its exponential.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ray_dwm.config.selection import DsirConfig
from ray_dwm.data.shards import Rows
from ray_dwm.errors import DataError
from ray_dwm.selection.method import Arrays, RowFunction, Task
from ray_dwm.selection.ngrams import ngrams

_SMOOTHING = 1e-8
"""Added to every probability, as in the published code."""


def prepare(task: Task) -> RowFunction:
    """Bag models of pool and target sets; of several target sets the mean of their models is the target's."""
    options = task.options.dsir
    pool = _model(task, "pool", str(task.pool.folder), task.scratch)
    target = np.mean([_model(task, name, str(m.folder)) for name, m in task.targets.items()], axis=0)
    return LogRatios(str(task.pool.folder), options, log_ratios(target, pool), task.scratch)


def log_ratios(target: NDArray[np.float64], pool: NDArray[np.float64]) -> NDArray[np.float64]:
    """log p_target - log p_pool of every bucket, from probabilities, (buckets,)."""
    return np.log(target + _SMOOTHING) - np.log(pool + _SMOOTHING)


def _model(task: Task, name: str, folder: str, kept: str = "") -> NDArray[np.float64]:
    counts = np.zeros(task.options.dsir.buckets, dtype=np.int64)
    for block in task.sweep(f"n-grams of {name}", folder, Counts(folder, task.options.dsir, kept)):
        counts += block["counts"]
    if not counts.any():
        raise DataError(f"{folder} has no words to learn from: choose another target set, or features=tokens")
    return counts / counts.sum()


@dataclass(frozen=True, slots=True)
class Counts:
    """n-grams of some rows, counted by bucket."""

    folder: str
    options: DsirConfig
    kept: str

    def __call__(self, rows: Rows) -> Arrays:
        o = self.options
        found = ngrams(rows, self.folder, o.features, o.bigrams, o.buckets, self.kept)
        return {"counts": np.bincount(found.buckets_k, minlength=o.buckets)}


@dataclass(frozen=True, slots=True)
class LogRatios:
    """Log importance ratio of some rows."""

    folder: str
    options: DsirConfig
    log_ratios: NDArray[np.float64]
    kept: str

    def __call__(self, rows: Rows) -> Arrays:
        o = self.options
        found = ngrams(rows, self.folder, o.features, o.bigrams, o.buckets, self.kept)
        return {"score": np.bincount(found.rows_k, self.log_ratios[found.buckets_k], minlength=len(rows))}
