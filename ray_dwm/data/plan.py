"""Which sequence is in which global batch: a pure function of (files, seed, epoch).

The files are cut into blocks of contiguous rows; an epoch permutes the blocks, groups consecutive ones into
windows and permutes the rows of each window. Reading therefore touches a bounded part of the corpus at a
time, nothing is shuffled in memory or in an object store, and batch k holds the same samples whatever the
number of workers, the accumulation or the number of restarts.

Shards whose order means something (a curriculum) are read as they are stored in the first epoch; later epochs, in
which every row has been seen, are shuffled like any other's.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from ray_dwm.errors import DataError

WORTH_EPOCHS = 4.0
"""Beyond about four passes repeated data is worth little: Muennighoff et al., NeurIPS 2023 (arXiv 2305.16264)."""


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where training is: `batches` global batches have been consumed, all epochs counted."""

    batches: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadPlan:
    """The read order. Rows are numbered through all files.

    An epoch has `rows // global_batch` batches; the remainder, a different one every epoch, is left out.
    """

    rows_per_file: tuple[int, ...]
    global_batch: int
    seed: int
    block_rows: int = 32
    window_blocks: int = 1024
    stored: bool = False
    """Read the first epoch in the order of the files; its remainder are the last rows."""

    def __post_init__(self) -> None:
        if self.batches_per_epoch == 0:
            raise DataError(
                f"the shards hold {sum(self.rows_per_file)} sequences, fewer than a global batch of "
                f"{self.global_batch}: prepare more data or lower the batch"
            )

    @property
    def batches_per_epoch(self) -> int:
        """Whole global batches in one epoch."""
        return sum(self.rows_per_file) // self.global_batch

    def rows(self, batch: int, rank: int = 0, world: int = 1) -> NDArray[np.int64]:
        """Row numbers of one rank's share of global batch `batch` (counted over all epochs), see `share_positions`."""
        epoch, within = divmod(batch, self.batches_per_epoch)
        return self.at(epoch, within * self.global_batch + share_positions(self.global_batch, rank, world))

    def at(self, epoch: int, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Row numbers at ascending positions of an epoch's order, remainder included."""
        if self.stored and epoch == 0:
            return positions
        _, bounds = _epoch_windows(self, epoch)
        first, last = (int(np.searchsorted(bounds, positions[end], side="right")) - 1 for end in (0, -1))
        order = np.concatenate([_window_rows(self, epoch, window) for window in range(first, last + 1)])
        return order[positions - int(bounds[first])]


def share_positions(size: int, rank: int, world: int) -> NDArray[np.int64]:
    """Positions of one rank's share of `size` sequences, shape (ceil(size / world),): as many on every rank.

    Ranks take consecutive parts, so that what they bring, in rank order, begins with the `size` sequences. What the
    last ranks lack is padded with copies of the last sequence, which must not count.
    """
    share = -(-size // world)
    return np.minimum(np.arange(rank * share, (rank + 1) * share, dtype=np.int64), size - 1)


_BLOCKS, _WINDOW, _TARGET = range(3)


def _generator(seed: int, use: int, *key: int) -> np.random.Generator:
    """A stream of its own for every use and key."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, use, *key))))


@lru_cache(maxsize=4)
def _epoch_windows(plan: ReadPlan, epoch: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """An epoch's blocks in order, shape (blocks, 2) as [start, stop), and the first position of each window."""
    blocks = []
    base = 0
    for rows in plan.rows_per_file:
        starts = np.arange(base, base + rows, plan.block_rows, dtype=np.int64)
        blocks.append(np.stack([starts, np.minimum(starts + plan.block_rows, base + rows)], axis=1))
        base += rows
    order = np.concatenate(blocks)
    order = order[_generator(plan.seed, _BLOCKS, epoch).permutation(len(order))]
    ends = np.concatenate([[0], np.cumsum(order[:, 1] - order[:, 0])])
    return order, ends[:-1][:: plan.window_blocks]


@lru_cache(maxsize=4)
def _window_rows(plan: ReadPlan, epoch: int, window: int) -> NDArray[np.int64]:
    """The rows of one window in their final order."""
    order, _ = _epoch_windows(plan, epoch)
    blocks = order[window * plan.window_blocks : (window + 1) * plan.window_blocks]
    rows = np.concatenate([np.arange(start, stop, dtype=np.int64) for start, stop in blocks])
    return _generator(plan.seed, _WINDOW, epoch, window).permutation(rows)


def target_rows(rows: int, batch: int, update: int, seed: int) -> NDArray[np.int64]:
    """Rows of the target batch of the update-th bi-level step, drawn afresh without replacement, shape (batch,)."""
    return _generator(seed, _TARGET, update).choice(rows, size=batch, replace=False).astype(np.int64)
