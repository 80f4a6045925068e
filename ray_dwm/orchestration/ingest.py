"""Ray Data streams the shards: every worker executes its own small dataset of read tasks.

A read task memory-maps the shards and yields this rank's share of the global batches, in the read plan's order and
in blocks of a few batches; it is a generator that waits where nobody takes its blocks. Nothing is shuffled or
materialised in the object store, and its use is bounded. Each worker drives its own stream (instead of one
`streaming_split` for all), because only so batch k is a pure function of the plan and resuming is a matter of
starting at another batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import numpy as np
import pyarrow as pa
import ray.data
from numpy.typing import NDArray
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from ray_dwm.data.plan import ReadPlan, share_positions
from ray_dwm.data.shards import Rows, fixed_lists, open_shards
from ray_dwm.data.stages import StagedPlan
from ray_dwm.errors import DataError
from ray_dwm.orchestration.cluster import quiet_ray_data

_BLOCKS_IN_MEMORY = 64
"""So many blocks fit what ingest may hold: large ones for speed (Ray's work is per block), and enough to stream."""
_TASK_BLOCKS = 64
"""Blocks of one read task: few tasks start fast, and a lost one is not much to read again."""


class RankDatasource(Datasource):
    """One rank's share of the global batches first .. stop - 1, in blocks of about `block_bytes`."""

    def __init__(
        self, folder: str, plan: ReadPlan | StagedPlan, rank: int, world: int, first: int, stop: int, block_bytes: int
    ) -> None:
        self.share = len(share_positions(plan.global_batch, rank, world))
        self._row_bytes = open_shards(folder).row_bytes + 8  # and the number of the batch
        self.block_batches = max(1, min(block_bytes // (self.share * self._row_bytes), stop - first))
        self._read = partial(_read, folder, plan, rank, world, self.block_batches)
        self._first, self._stop = first, stop

    @property
    def block_bytes(self) -> int:
        """Of a whole block."""
        return self.block_batches * self.share * self._row_bytes

    def estimate_inmemory_data_size(self) -> int:
        """See Datasource."""
        return (self._stop - self._first) * self.share * self._row_bytes

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: object = None
    ) -> list[ReadTask]:
        """Tasks in the order of the batches; `parallelism` is Ray's wish and does not change the output."""
        del parallelism, data_context
        size = _TASK_BLOCKS * self.block_batches
        tasks = []
        for start in range(self._first, self._stop, size):
            stop = min(start + size, self._stop)
            rows = (stop - start) * self.share
            metadata = BlockMetadata(
                num_rows=rows, size_bytes=rows * self._row_bytes, input_files=None, exec_stats=None
            )
            tasks.append(ReadTask(partial(self._read, start, stop), metadata, per_task_row_limit=per_task_row_limit))
        return tasks


def _read(
    folder: str, plan: ReadPlan | StagedPlan, rank: int, world: int, block_batches: int, start: int, stop: int
) -> Iterator[pa.Table]:
    reader = open_shards(folder)
    for first in range(start, stop, block_batches):
        numbers = range(first, min(first + block_batches, stop))
        shares = [plan.rows(batch, rank, world) for batch in numbers]
        rows = reader.take(np.concatenate(shares))
        columns = {
            "batch": pa.array(np.repeat(numbers, [len(share) for share in shares])),
            "sample_id": pa.array(rows.sample_ids),
            "domain": pa.array(rows.domains),
            "input_ids": fixed_lists(rows.input_ids),
        }
        if rows.loss_mask is not None:
            columns["loss_mask"] = fixed_lists(rows.loss_mask)
        yield pa.table(columns)


class RayDataSource:
    """A BatchSource that streams through Ray Data."""

    def __init__(
        self, folder: str, plan: ReadPlan | StagedPlan, rank: int, world: int, prefetch: int, memory_mb: int
    ) -> None:
        self._folder, self._plan, self._rank, self._world = folder, plan, rank, world
        self._prefetch, self._memory_bytes = prefetch, memory_mb * 2**20

    def stream(self, first_batch: int, stop_batch: int) -> Iterator[Rows]:
        """See BatchSource.

        Raises:
            DataError: where Ray Data hands over anything but the next share of the plan.
        """
        if first_batch >= stop_batch:
            return
        plan, block_bytes = self._plan, self._memory_bytes // _BLOCKS_IN_MEMORY
        source = RankDatasource(
            self._folder, plan, self._rank, self._world, first_batch, stop_batch, block_bytes=block_bytes
        )
        share, batch = source.share, first_batch
        for table in self._blocks(source):
            numbers = table.column("batch").to_numpy()
            due = np.repeat(np.arange(batch, min(batch + source.block_batches, stop_batch)), share)
            if not np.array_equal(numbers, due):
                raise DataError(f"Ray Data did not deliver batch {batch} of the read plan next: a bug, report it")
            rows = _rows(table)
            for start in range(0, len(rows), share):
                yield rows[start : start + share]
            batch += len(rows) // share
        if batch != stop_batch:
            raise DataError(f"Ray Data ended before batch {batch} of {stop_batch}: a bug, report it")

    def _blocks(self, source: RankDatasource) -> Iterator[pa.Table]:
        context = ray.data.DataContext.get_current()
        quiet_ray_data()
        context.execution_options.preserve_order = True
        context.execution_options.resource_limits = ray.data.ExecutionResources(object_store_memory=self._memory_bytes)
        # Ray Data gathers what a task yields until it exceeds this size, and cuts what is 1.5 times as large.
        context.target_max_block_size = source.block_bytes * 4 // 5
        dataset = ray.data.read_datasource(
            source,
            override_num_blocks=len(source.get_read_tasks(1)),
            concurrency=1,  # one process reads far more than one LM eats; out of order, blocks would only pile up
            num_cpus=0,  # I/O beside the workers' computing: it must find room where workers fill a node
        )
        return dataset.iter_batches(
            batch_size=source.block_batches * source.share,
            batch_format="pyarrow",
            prefetch_batches=math.ceil(self._prefetch / source.block_batches),
        )


def _rows(table: pa.Table) -> Rows:
    table = table.combine_chunks()  # of one chunk already, unless Ray Data has cut otherwise than asked

    def matrix(name: str) -> NDArray[np.generic]:
        return table.column(name).chunk(0).flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1)

    return Rows(
        table.column("sample_id").to_numpy(),
        table.column("domain").to_numpy(),
        matrix("input_ids"),
        matrix("loss_mask") if "loss_mask" in table.schema.names else None,
    )
