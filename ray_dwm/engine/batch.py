"""A rank's share of a global batch, as tensors on its device, and where it comes from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from ray_dwm.core.losses import predicted_mask
from ray_dwm.data.plan import ReadPlan, share_positions, target_rows
from ray_dwm.data.shards import Rows, ShardReader
from ray_dwm.data.stages import StagedPlan


@dataclass(frozen=True, slots=True)
class Batch:
    """b = this rank's sequences, as many on every rank, T = tokens.

    Where the ranks do not divide the batch, the last ones have padding at their end: sequences that do not count.
    """

    sample_ids: Tensor
    """(b,)"""
    domains: Tensor
    """(b,)"""
    input_ids: Tensor
    """(b, T)"""
    mask: Tensor
    """(b, T-1): which next-token predictions count."""

    def __len__(self) -> int:
        return len(self.sample_ids)

    def rows(self, rows: Tensor) -> Batch:
        """The named rows."""
        keys = rows.cpu()  # ids and domains stay there
        return Batch(self.sample_ids[keys], self.domains[keys], self.input_ids[rows], self.mask[rows])

    def micro_batches(self, size: int) -> list[Batch]:
        """Consecutive parts of at most `size` sequences."""
        return [
            Batch(*(x[i : i + size] for x in (self.sample_ids, self.domains, self.input_ids, self.mask)))
            for i in range(0, len(self), size)
        ]


def to_batch(rows: Rows, size: int, seq_len: int, device: torch.device) -> Batch:
    """This rank's share of `size` rows as tensors, cut to the first `seq_len` tokens; nothing of padding counts."""
    real = np.arange(len(rows)) < size - dist.get_rank() * len(rows)
    input_ids = torch.from_numpy(rows.input_ids[:, :seq_len].astype(np.int64)).to(device)
    loss_mask = None if rows.loss_mask is None else torch.from_numpy(rows.loss_mask[:, :seq_len]).to(device)
    return Batch(
        torch.from_numpy(rows.sample_ids.copy()),
        torch.from_numpy(rows.domains.astype("int64")),
        input_ids,
        predicted_mask(loss_mask, input_ids) & torch.from_numpy(real).to(device)[:, None],
    )


def take_share(reader: ShardReader, rows: NDArray[np.int64], seq_len: int, device: torch.device) -> Batch:
    """This rank's share of some rows of a set."""
    own = rows[share_positions(len(rows), dist.get_rank(), dist.get_world_size())]
    return to_batch(reader.take(own), len(rows), seq_len, device)


def draw(
    reader: ShardReader,
    sequences: int,
    number: int,
    seed: int,
    seq_len: int,
    device: torch.device,
    among: NDArray[np.int64] | None = None,
) -> Batch:
    """This rank's share of the `number`-th random draw of `sequences` rows of a set, over all ranks.

    Args:
        among: the rows that may be drawn; None: all.
    """
    rows = target_rows(reader.manifest.rows if among is None else len(among), sequences, number, seed)
    return take_share(reader, rows if among is None else among[rows], seq_len, device)


class BatchSource(Protocol):
    """Streams this rank's share of consecutive global batches."""

    def stream(self, first_batch: int, stop_batch: int) -> Iterator[Rows]:
        """Shares of the global batches first_batch .. stop_batch - 1."""
        ...


class LocalSource:
    """Reads the shards in this process: the reference that Ray Data ingest must equal."""

    def __init__(self, reader: ShardReader, plan: ReadPlan | StagedPlan, rank: int, world: int) -> None:
        self._reader, self._plan, self._rank, self._world = reader, plan, rank, world

    def stream(self, first_batch: int, stop_batch: int) -> Iterator[Rows]:
        """See BatchSource."""
        for batch in range(first_batch, stop_batch):
            yield self._reader.take(self._plan.rows(batch, self._rank, self._world))
