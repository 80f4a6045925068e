"""From scores to rows: how many of each domain, and which."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ray_dwm.selection.method import Scored, Task


def highest(task: Task, scored: Scored, count: int) -> NDArray[np.int64]:
    """The rows of highest score, ascending; among equal scores the earlier row wins."""
    return _within_domains(task, scored, count, _highest)


def drawn(task: Task, scored: Scored, count: int) -> NDArray[np.int64]:
    """Rows drawn without replacement in proportion to exp(score / temperature), ascending.

    The top of scores to which Gumbel noise is added (Kool et al. 2019, arXiv 1903.06059; Xie et al. 2023, section 3).
    """
    noise = np.random.Generator(np.random.Philox(task.seed)).gumbel(size=len(scored))
    noisy = Scored(scored.scores / task.options.temperature + noise, scored.domains)
    return _within_domains(task, noisy, count, _highest)


def equally(task: Task, scored: Scored, count: int, among: NDArray[np.bool_] | None = None) -> NDArray[np.int64]:
    """Rows drawn at random whatever their scores, ascending.

    Args:
        among: (n,), the rows that may be drawn, at least `count`; None: all of them.
    """
    noise = np.random.Generator(np.random.Philox(task.seed)).random(size=len(scored))
    if among is not None:
        noise[~among] = -np.inf
    return _within_domains(task, Scored(noise, scored.domains), count, _highest)


def _highest(scores: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    return np.sort(np.argsort(-scores, kind="stable")[:count])


def _within_domains(
    task: Task,
    scored: Scored,
    count: int,
    choose: Callable[[NDArray[np.float64], int], NDArray[np.int64]],
) -> NDArray[np.int64]:
    if not task.options.stratified:
        return choose(scored.scores, count)
    domains = len(task.pool.domains)
    sizes = np.bincount(scored.domains, minlength=domains)
    available = np.bincount(scored.domains[scored.scores > -np.inf], minlength=domains)
    return _of_each(scored, quotas(sizes / sizes.sum(), count, available), choose)


def highest_of_each(scored: Scored, counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """So many rows of each domain, by its code, those of the highest scores, ascending."""
    return _of_each(scored, counts, _highest)


def _of_each(
    scored: Scored,
    counts: NDArray[np.int64],
    choose: Callable[[NDArray[np.float64], int], NDArray[np.int64]],
) -> NDArray[np.int64]:
    parts = []
    for code, count in enumerate(counts):
        rows = np.flatnonzero(scored.domains == code)
        parts.append(rows[choose(scored.scores[rows], int(count))])
    return np.sort(np.concatenate(parts))


def quotas(proportions: NDArray[np.float64], count: int, available: NDArray[np.int64]) -> NDArray[np.int64]:
    """Rows of each domain, summing to `count`: as near to the proportions as whole numbers and the pool allow.

    What a domain lacks goes to the others in proportion; remainders go to the largest fractions (Hamilton's method).

    Args:
        proportions: (domains,), not negative, not all 0.
        available: (domains,), rows that there are; together at least `count`.
    """
    assert available.sum() >= count
    full = available == 0
    while True:  # each turn fills a domain, or is the last
        weights = np.where(full, 0.0, proportions)
        if weights.sum() == 0:  # only domains of proportion 0 have rows left
            weights = np.where(full, 0.0, available)
        left = count - int(available[full].sum())
        exact = np.where(full, available, left * weights / (weights.sum() or 1.0))
        over = ~full & (exact >= available)
        if not over.any():
            break
        full |= over
    whole = np.floor(exact).astype(np.int64)
    rest = count - int(whole.sum())
    whole[np.argsort(whole - exact, kind="stable")[:rest]] += 1
    return whole
