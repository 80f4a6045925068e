"""Ray Data streams the shards: every worker executes its own small dataset of read tasks.

A read task memory-maps the shards and yields this rank's share of a few dozen global batches, in the read
plan's order; nothing is shuffled or materialised in the object store, and its use is bounded. Each worker
drives its own stream (instead of one `streaming_split` for all), because only so batch k is a pure function
of the plan and resuming is a matter of starting at another batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np
import pyarrow as pa
import ray.data
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from ray_dwm.data.plan import ReadPlan, share_positions
from ray_dwm.data.shards import Rows, open_shards
from ray_dwm.errors import DataError
from ray_dwm.orchestration.cluster import quiet_ray_data

_TASK_BYTES = 8 * 2**20
_MAX_BATCHES_PER_TASK = 256


class RankDatasource(Datasource):
    """One rank's share of the global batches first .. stop - 1."""

    def __init__(self, folder: str, plan: ReadPlan, rank: int, world: int, first: int, stop: int) -> None:
        self._read = partial(_read, folder, plan, rank, world)
        self._share = len(share_positions(plan.global_batch, rank, world))
        self._row_bytes = open_shards(folder).manifest.seq_len * 2 + 24
        self._first, self._stop = first, stop

    @property
    def batches_per_task(self) -> int:
        """So many that a task returns a few megabytes."""
        return max(1, min(_MAX_BATCHES_PER_TASK, _TASK_BYTES // (self._share * self._row_bytes)))

    def estimate_inmemory_data_size(self) -> int:
        """See Datasource."""
        return (self._stop - self._first) * self._share * self._row_bytes

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: object = None
    ) -> list[ReadTask]:
        """Tasks in the order of the batches; `parallelism` is Ray's wish and does not change the output."""
        del parallelism, data_context
        size = self.batches_per_task
        tasks = []
        for start in range(self._first, self._stop, size):
            stop = min(start + size, self._stop)
            rows = (stop - start) * self._share
            metadata = BlockMetadata(
                num_rows=rows, size_bytes=rows * self._row_bytes, input_files=None, exec_stats=None
            )
            tasks.append(ReadTask(partial(self._read, start, stop), metadata, per_task_row_limit=per_task_row_limit))
        return tasks


def _read(folder: str, plan: ReadPlan, rank: int, world: int, start: int, stop: int) -> Iterator[pa.Table]:
    reader = open_shards(folder)
    kind = pa.uint16() if reader.manifest.vocab_size <= 2**16 else pa.int32()
    for batch in range(start, stop):
        rows = reader.take(plan.rows(batch, rank, world))
        columns = {
            "batch": pa.array(np.full(len(rows), batch, dtype=np.int64)),
            "sample_id": pa.array(rows.sample_ids),
            "domain": pa.array(rows.domains),
            "input_ids": _lists(rows.input_ids, kind),
        }
        if rows.loss_mask is not None:
            columns["loss_mask"] = _lists(rows.loss_mask, pa.bool_())
        yield pa.table(columns)


def _lists(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1), type=kind), values.shape[1])


class RayDataSource:
    """A BatchSource that streams through Ray Data."""

    def __init__(self, folder: str, plan: ReadPlan, rank: int, world: int, prefetch: int, memory_mb: int) -> None:
        self._folder, self._plan, self._rank, self._world = folder, plan, rank, world
        self._prefetch, self._memory_bytes = prefetch, memory_mb * 2**20

    def stream(self, first_batch: int, stop_batch: int) -> Iterator[Rows]:
        """See BatchSource.

        Raises:
            DataError: where Ray Data hands over anything but the next share of the plan.
        """
        context = ray.data.DataContext.get_current()
        quiet_ray_data()
        context.execution_options.preserve_order = True
        context.execution_options.resource_limits = ray.data.ExecutionResources(
            cpu=1, object_store_memory=self._memory_bytes
        )
        source = RankDatasource(self._folder, self._plan, self._rank, self._world, first_batch, stop_batch)
        tasks = len(source.get_read_tasks(1))
        # Reading is I/O beside the workers' computing: a sliver of a logical CPU, so that it always finds room.
        dataset = ray.data.read_datasource(source, override_num_blocks=tasks, ray_remote_args={"num_cpus": 0})
        share = len(share_positions(self._plan.global_batch, self._rank, self._world))
        tables = dataset.iter_batches(batch_size=share, batch_format="pyarrow", prefetch_batches=self._prefetch)
        for batch, table in zip(range(first_batch, stop_batch), tables, strict=True):
            numbers = table.column("batch").to_numpy()
            if len(table) != share or (numbers != batch).any():
                raise DataError(
                    f"Ray Data delivered batch {numbers.min()} where batch {batch} was due: a bug, report it"
                )
            yield _rows(table)


def _rows(table: pa.Table) -> Rows:
    table = table.combine_chunks()

    def matrix(name: str) -> np.ndarray:
        return np.asarray(table.column(name).chunk(0).flatten().to_numpy(zero_copy_only=False)).reshape(len(table), -1)

    return Rows(
        table.column("sample_id").to_numpy(),
        table.column("domain").to_numpy(),
        matrix("input_ids").astype(np.int64),
        matrix("loss_mask") if "loss_mask" in table.schema.names else None,
    )
