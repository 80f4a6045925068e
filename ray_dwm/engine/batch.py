"""A rank's share of a global batch, as tensors on its device, and where it comes from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ray_dwm.core.losses import predicted_mask
from ray_dwm.data.plan import ReadPlan, target_rows
from ray_dwm.data.shards import Rows, ShardReader


@dataclass(frozen=True, slots=True)
class Batch:
    """b = this rank's sequences, T = tokens."""

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


def to_batch(rows: Rows, seq_len: int, device: torch.device) -> Batch:
    """Rows as tensors, cut to the first `seq_len` tokens."""
    input_ids = torch.from_numpy(rows.input_ids[:, :seq_len].astype("int64")).to(device)
    loss_mask = None if rows.loss_mask is None else torch.from_numpy(rows.loss_mask[:, :seq_len]).to(device)
    return Batch(
        torch.from_numpy(rows.sample_ids.copy()),
        torch.from_numpy(rows.domains.astype("int64")),
        input_ids,
        predicted_mask(loss_mask, input_ids),
    )


def draw(reader: ShardReader, sequences: int, number: int, seed: int, seq_len: int, device: torch.device) -> Batch:
    """This rank's share of the `number`-th random draw of `sequences` rows of a set, over all ranks."""
    rows = target_rows(reader.manifest.rows, sequences, number, seed)
    share = sequences // dist.get_world_size()
    start = dist.get_rank() * share
    return to_batch(reader.take(rows[start : start + share]), seq_len, device)


class BatchSource(Protocol):
    """Streams this rank's share of consecutive global batches."""

    def stream(self, first_batch: int, stop_batch: int) -> Iterator[Rows]:
        """Shares of the global batches first_batch .. stop_batch - 1."""
        ...


class LocalSource:
    """Reads the shards in this process: the reference that Ray Data ingest must equal."""

    def __init__(self, reader: ShardReader, plan: ReadPlan, rank: int, world: int) -> None:
        self._reader, self._plan, self._rank, self._world = reader, plan, rank, world

    def stream(self, first_batch: int, stop_batch: int) -> Iterator[Rows]:
        """See BatchSource."""
        for batch in range(first_batch, stop_batch):
            yield self._reader.take(self._plan.rows(batch, self._rank, self._world))
