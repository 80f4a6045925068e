"""DsDm: rows by how much they are estimated to lower the target loss, from gradients of proxy LMs.

Engstrom et al. 2024 (arXiv 2401.12926) choose the rows of highest estimated effect; their estimator is TRAK (Park et
al. 2023, arXiv 2303.14186, equation 13), whose code for LMs they did not publish. With phi_i the projected gradient of
row i's loss and phi_t the target set's mean one, the score is phi_i^T (Phi^T Phi / n + lambda)^-1 phi_t, a mean over
proxies. A sequence's log-likelihood is the model output whose effect is linearised; its loss is that output's negative,
so TRAK's factor dloss/doutput is the same for all rows and falls away.

Legend: n = rows, k = features.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ray_dwm.config.selection import DsdmConfig
from ray_dwm.data.shards import Rows
from ray_dwm.errors import DataError
from ray_dwm.evaluation.perplexity import to_tensors
from ray_dwm.selection.gradients import PROJECTIONS
from ray_dwm.selection.method import Arrays, RowFunction, Task
from ray_dwm.selection.proxy import load_proxy
from ray_dwm.selection.random import uniform


def prepare(task: Task) -> RowFunction:
    """Every proxy's direction; each target set counts the same.

    The kernel is estimated from `kernel_rows` rows, and no features outlive their scores. For 15 million rows of 2048
    tokens those of k = 4096 would take 123 GB in half precision, twice what the tokens take; computing those of the
    `kernel_rows` rows a second time adds 0.4 % to the scoring.
    """
    o = task.options
    looks = [Features(folder, o.dsdm, o.proxy.batch, task.seed + number) for number, folder in enumerate(task.proxies)]
    return Scores(tuple(looks), np.stack([_direction(task, look, number) for number, look in enumerate(looks)]))


def _direction(task: Task, look: Features, number: int) -> NDArray[np.float32]:
    k, folder = task.options.dsdm.features, str(task.pool.folder)
    sampled = Sampled(look, task.options.dsdm.kernel_rows / task.pool.rows, task.seed)
    found = task.sweep(f"gradients of pool by proxy {number}", folder, sampled)
    gram, rows = second_moment((block["features"] for block in found), k)
    means: list[NDArray[np.float64]] = []
    for name, manifest in task.targets.items():
        blocks = list(task.sweep(f"gradients of {name} for proxy {number}", str(manifest.folder), Summed(look)))
        total = np.concatenate([block["features"] for block in blocks]).sum(axis=0)
        means.append(total / np.concatenate([block["counted"] for block in blocks]).sum())
    return solve(gram, rows, np.mean(means, axis=0), task.options.dsdm.damping, look.folder)


def second_moment(parts: Iterable[NDArray[np.float32]], k: int) -> tuple[NDArray[np.float64], int]:
    """Phi^T Phi / n, (k, k), and n, of features that come in parts of any number of rows."""
    gram, rows = np.zeros((k, k)), 0
    for features in _gathered(parts, k):
        gram += features.T @ features
        rows += len(features)
    return gram / rows, rows


def _gathered(parts: Iterable[NDArray[np.float32]], least: int) -> Iterator[NDArray[np.float32]]:
    """The same rows in fewer parts: adding up a product takes k x k however few rows it is of."""
    waiting: list[NDArray[np.float32]] = []
    for part in parts:
        waiting.append(part)
        if sum(map(len, waiting)) >= least:
            yield np.concatenate(waiting)
            waiting = []
    if waiting:
        yield np.concatenate(waiting)


def solve(
    kernel: NDArray[np.float64], rows: int, target: NDArray[np.float64], damping: float, proxy: str = ""
) -> NDArray[np.float32]:
    """(kernel + damping * e)^-1 target, (k,), e being the mean of the kernel's min(n, k) largest eigenvalues.

    Args:
        kernel: Phi^T Phi / n, (k, k).
        rows: n.

    Raises:
        DataError: something is not finite.
    """
    if not (np.isfinite(kernel).all() and np.isfinite(target).all() and kernel.any()):
        raise DataError(
            f"gradients of proxy LM {proxy} are not finite, or all 0: it has diverged, train it with a lower "
            "selection.proxy.lr or name another in selection.proxy.folders"
        )
    regular = kernel + damping * kernel.trace() / min(rows, len(kernel)) * np.eye(len(kernel))
    return np.linalg.solve(regular, target).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Features:
    """Gradient features of rows by one proxy."""

    folder: str
    options: DsdmConfig
    batch: int
    seed: int

    def __call__(self, rows: Rows) -> NDArray[np.float32]:
        """(n, k)."""
        model, function = load_proxy(self.folder), PROJECTIONS[self.options.projection]
        device = next(model.parameters()).device
        found = [torch.empty(0, self.options.features)]
        for start in range(0, len(rows), self.batch):
            ids, mask = to_tensors(rows[start : start + self.batch], device)
            found.append(function(model, ids, mask, self.options.features, self.seed).cpu())
        return torch.cat(found).numpy()


@dataclass(frozen=True, slots=True)
class Sampled:
    """Features of about a share of the rows, drawn by sample id."""

    look: Features
    share: float
    seed: int

    def __call__(self, rows: Rows) -> Arrays:
        return {"features": self.look(rows[np.flatnonzero(uniform(rows.sample_ids, self.seed) < self.share)])}


@dataclass(frozen=True, slots=True)
class Summed:
    """Sum of the rows' features, (1, k), and each one's share of predictions that count."""

    look: Features

    def __call__(self, rows: Rows) -> Arrays:
        counted = np.ones(len(rows)) if rows.loss_mask is None else rows.loss_mask[:, 1:].mean(axis=1)
        return {"features": self.look(rows).astype(np.float64).sum(axis=0, keepdims=True), "counted": counted}


@dataclass(frozen=True, slots=True)
class Scores:
    """Mean over proxies of the products of features and direction."""

    looks: tuple[Features, ...]
    directions: NDArray[np.float32]
    """(proxies, k)"""

    def __call__(self, rows: Rows) -> Arrays:
        found = np.zeros(len(rows))
        for look, direction in zip(self.looks, self.directions, strict=True):
            found += look(rows) @ direction / len(self.looks)
        return {"score": found}
