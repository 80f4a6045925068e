"""Curriculum: a random part of the pool, written in an order from easy to hard that training keeps.

The budget draws the sequences at random (within domains where `stratified`), whatever their difficulty and the order:
easy_first, hard_first and shuffled differ in nothing but order. They are ranked by ease, ties at random. Then the
order is made as training would draw it: of n sequences,

    m(k) = max(ceil(n c(k / n)), k + 1)

are available for the k-th place, k = 0 .. n - 1; one of them that has no place yet is drawn uniformly. c(t) is the
pacing function: the part of the ranking that is available after the part t of training. Each sequence has one place,
so where c asks for fewer than have been used, the next of the ranking follows. With x = min(t / full, 1):

    linear     start + (1 - start) x                 Platanios et al. 2019, arXiv 1903.09848
    root       sqrt(start^2 + (1 - start^2) x)       the same
    geometric  start^(1 - x)                         Hacohen & Weinshall 2019, arXiv 1904.03626: fixed exponential
                                                     pacing, without its steps
    stepwise   start where x < 1, else 1             the same: single-step pacing

linear with start=0 and full=1 is the plain ranking. t counts the budget, which is training's first epoch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_dwm.config import to_dict
from ray_dwm.config.selection import CurriculumConfig, SelectionConfig
from ray_dwm.data.manifest import Manifest
from ray_dwm.data.shards import Rows
from ray_dwm.selection import dsir, dwm, perplexity
from ray_dwm.selection.choose import equally
from ray_dwm.selection.method import Arrays, RowFunction, Scored, Task

_ORDERING = 1
"""Numbers other than those that draw the sequences."""


def prepare(task: Task) -> RowFunction:
    """The scorer of the criterion, by which the easiest row has the highest score."""
    match task.options.curriculum.criterion:
        case "perplexity":
            return perplexity.prepare(task)
        case "similarity":
            return dsir.prepare(task)
        case "dwm":
            return dwm.prepare(task)
        case _:
            return Brevity(task.pool.eos_token_id)


def finish(task: Task, blocks: Iterable[Arrays]) -> Iterable[Arrays]:
    """See Method.finish."""
    return dwm.finish(task, blocks) if task.options.curriculum.criterion == "dwm" else blocks


def depends(options: SelectionConfig) -> dict[str, Any]:
    """The criterion and what it looks at; order and pacing are a matter of the choice."""
    match criterion := options.curriculum.criterion:
        case "similarity":
            return {"criterion": criterion, **to_dict(options.dsir)}
        case "dwm":
            return {"criterion": criterion, **dwm.depends(options)}
        case _:
            return {"criterion": criterion}


def check(options: SelectionConfig, pool: Manifest, count: int) -> None:
    """See Method.check."""
    if options.curriculum.criterion == "dwm":
        dwm.check(options, pool, count)


def choose(task: Task, scored: Scored, count: int) -> NDArray[np.int64]:
    """Random rows, in the order of the curriculum."""
    rows = equally(task, scored, count)
    return rows[arranged(scored.scores[rows], task.options.curriculum, task.seed)]


def arranged(ease: NDArray[np.float64], options: CurriculumConfig, seed: int) -> NDArray[np.int64]:
    """Row numbers in the order of a curriculum, from (n,) ease."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, _ORDERING))))
    if options.order == "shuffled":
        return generator.permutation(len(ease))
    hardness = -ease if options.order == "easy_first" else ease
    ranked = np.lexsort((generator.random(len(ease)), hardness))
    fractions = pacing(options, np.arange(len(ease)) / len(ease))
    return ranked[paced(available(fractions), generator.random(len(ease)))]


def pacing(options: CurriculumConfig, t: NDArray[np.float64]) -> NDArray[np.float64]:
    """c(t), of the same shape: see above."""
    start, x = options.start, np.minimum(t / options.full, 1.0)
    match options.pacing:
        case "linear":
            return start + (1 - start) * x
        case "root":
            return np.sqrt(start**2 + (1 - start**2) * x)
        case "geometric":
            return start ** (1 - x)
        case _:
            return np.where(x < 1, start, 1.0)


def available(fractions: NDArray[np.float64]) -> NDArray[np.int64]:
    """m(k) of every place from c(k / n), (n,)."""
    n = len(fractions)
    wanted = np.ceil(n * fractions - 1e-9).astype(np.int64)  # 10 times 0.3 is a little more than 3
    return np.minimum(np.maximum(wanted, np.arange(1, n + 1)), n)


def paced(available: NDArray[np.int64], numbers: NDArray[np.float64]) -> NDArray[np.int64]:
    """Ranks in the order in which they are drawn, each once.

    Args:
        available: (n,), ranks below which may be drawn for each place; not decreasing.
        numbers: (n,), uniform on [0, 1).
    """
    waiting: list[int] = []
    order = np.empty(len(available), dtype=np.int64)
    admitted = 0
    for place, (limit, number) in enumerate(zip(available.tolist(), numbers.tolist(), strict=True)):
        waiting.extend(range(admitted, limit))
        admitted = limit
        drawn = int(number * len(waiting))
        order[place], waiting[drawn] = waiting[drawn], waiting[-1]
        waiting.pop()
    return order


@dataclass(frozen=True, slots=True)
class Brevity:
    """Minus the mean length in tokens of the documents in each row.

    A packed row is cut into documents by end-of-sequence tokens, which count to the document that they close. Of a
    document that reaches over the row's edge the part within it counts, so a row of one long document has length T.
    """

    eos_token_id: int

    def __call__(self, rows: Rows) -> Arrays:
        ends = rows.input_ids == self.eos_token_id
        documents = ends.sum(axis=1) + ~ends[:, -1]
        return {"score": -rows.input_ids.shape[1] / documents, "documents": documents}
