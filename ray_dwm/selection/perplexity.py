"""Perplexity band: a random part of the sequences whose perplexity under a proxy LM is neither too low nor too high.

CCNet (Wenzek et al. 2019, arXiv 1911.00359) cuts each language at quantiles of its perplexities;
Marion et al. 2023 (arXiv 2309.04564) compare the lowest, middle and highest part and find the middle best.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_dwm.config.selection import PerplexityConfig, SelectionConfig
from ray_dwm.data.manifest import Manifest
from ray_dwm.data.shards import Rows
from ray_dwm.errors import ConfigError
from ray_dwm.evaluation.perplexity import row_losses
from ray_dwm.selection.choose import equally
from ray_dwm.selection.method import Arrays, RowFunction, Scored, Task
from ray_dwm.selection.proxy import load_proxy


def prepare(task: Task) -> RowFunction:
    """Scores by the proxies that the task has."""
    return LogLikelihoods(task.proxies, task.options.proxy.batch)


@dataclass(frozen=True, slots=True)
class LogLikelihoods:
    """Minus the loss of some rows in nats per token, mean over the proxies; and the perplexity that follows from it."""

    proxies: tuple[str, ...]
    batch: int
    """Rows in one forward pass."""

    def __call__(self, rows: Rows) -> Arrays:
        losses = np.mean([np.concatenate(list(self._losses(folder, rows))) for folder in self.proxies], axis=0)
        return {"score": -losses, "perplexity": np.exp(losses)}

    def _losses(self, folder: str, rows: Rows) -> Iterator[NDArray[np.float64]]:
        model = load_proxy(folder)
        for start in range(0, len(rows), self.batch):
            nats, tokens = row_losses(model, rows[start : start + self.batch])
            yield nats / np.maximum(tokens, 1)


def depends(options: SelectionConfig) -> dict[str, Any]:
    """Nothing but the proxies: the band is a matter of the choice."""
    del options
    return {}


def choose(task: Task, scored: Scored, count: int) -> NDArray[np.int64]:
    """Random rows of the band, ascending."""
    return equally(task, scored, count, band(task.options.perplexity, scored))


def band(options: PerplexityConfig, scored: Scored) -> NDArray[np.bool_]:
    """Which rows lie in the band, (n,): from the low-th to the high-th quantile of perplexities, by rank."""
    inside = np.zeros(len(scored), dtype=bool)
    domains = scored.domains if options.per_domain else np.zeros_like(scored.domains)
    for code in np.unique(domains):
        rows = np.flatnonzero(domains == code)
        ranked = rows[np.argsort(-scored.scores[rows], kind="stable")]
        inside[ranked[_ranks(options, len(rows))]] = True
    return inside


def _ranks(options: PerplexityConfig, rows: int) -> slice:
    return slice(round(options.low * rows), round(options.high * rows))


def check(options: SelectionConfig, pool: Manifest, count: int) -> None:
    """Refuse a budget for which the band is too small; its size does not depend on the scores.

    Raises:
        ConfigError: naming the budget and the band's size.
    """
    o = options.perplexity
    parts = [_ranks(o, n) for n in ([d.rows for d in pool.domains.values()] if o.per_domain else [pool.rows])]
    size = sum(part.stop - part.start for part in parts)
    if count > size:
        raise ConfigError(
            f"selection.budget asks for {count} sequences, the perplexity band from {o.low:g} to {o.high:g} holds "
            f"{size} of the pool's {pool.rows}: lower it, or widen selection.perplexity.low and high"
        )
