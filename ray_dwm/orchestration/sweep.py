"""All rows of a set through a function on Ray Data, block by block; finished blocks survive an interruption."""

from __future__ import annotations

import hashlib
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from ray_dwm.config.selection import SelectionConfig
from ray_dwm.data.manifest import load_manifest
from ray_dwm.data.records import read_arrays, save_array, save_arrays
from ray_dwm.data.shards import open_shards
from ray_dwm.errors import DataError, DwmError, ResourceError, TrainingError
from ray_dwm.orchestration.cluster import alive_nodes, fitting
from ray_dwm.selection.method import Arrays, RowFunction
from ray_dwm.selection.told import Told

_MOST_STARTS = 4
"""Of a unit of work whose process or node dies again and again; Ray Data would try for ever."""
_HUNGRY = "selection.block_tokens, selection.proxy.batch or selection.tasks"


class RaySweep:
    """A Sweep (see selection/method.py) whose results lie in a folder that all nodes see."""

    def __init__(self, work: Path, options: SelectionConfig, title: str = "") -> None:
        """Results go to `work`; what is told begins with the title."""
        self.work, self.options, self._title = work, options, title

    def __call__(
        self, name: str, folder: str, function: RowFunction, rows: NDArray[np.int64] | None = None, block: int = 0
    ) -> Iterator[Arrays]:
        """See Sweep.

        Raises:
            UserError, TrainingError: what the function raised for a block; the others' results stay.
        """
        results = self.work / _folder_name(name, folder, rows)
        results.mkdir(parents=True, exist_ok=True)
        manifest = load_manifest(folder)
        size = block or max(1, self.options.block_tokens // manifest.seq_len)
        total = manifest.rows if rows is None else len(rows)
        if rows is not None:
            save_array(results / _ROWS, rows)
        paths = [_path(results, size, number) for number in range(-(-total // size))]
        missing = [number for number, path in enumerate(paths) if not path.exists()]
        of: dict[str, Any] = {"folder": folder, "chosen": rows is not None, "results": results, "size": size}
        self.each(name, missing, partial(_write_block, function=function, **of), done=len(paths) - len(missing))
        for path in paths:
            yield read_arrays(path)

    def each(self, name: str, numbers: Sequence[int], function: Callable[[int], object], done: int = 0) -> None:
        """Run a function, which writes what it makes, on each of some numbers.

        Args:
            done: units of work that are there from before.

        Raises:
            ResourceError: no node has what one unit asks for; Ray alone would wait forever.
            UserError, TrainingError: what the function raised.
        """
        if not numbers:
            return
        o = self.options
        resources: dict[str, Any] = {"num_cpus": o.cpus_per_task}
        if o.gpus_per_task:
            resources["num_gpus"] = o.gpus_per_task
        elif ray.cluster_resources().get("GPU"):  # else every task would take its node's first one
            resources["runtime_env"] = {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}
        _require_room(o)
        starts = self.work / "starts"
        shutil.rmtree(starts, ignore_errors=True)
        starts.mkdir(parents=True, exist_ok=True)
        items = [{"number": number} for number in numbers]
        mapped = ray.data.from_items(items, override_num_blocks=len(items)).map(
            _run,
            fn_kwargs={"function": function, "starts": starts},
            compute=ray.data.TaskPoolStrategy(size=min(o.tasks, len(items))),
            **resources,
        )
        told = Told(self._title + name, done + len(items), done)
        for row in mapped.iter_rows():
            if row["error"]:
                raise _raised(name, row)
            told.one()


def _require_room(options: SelectionConfig) -> None:
    bundle = {"CPU": options.cpus_per_task, "GPU": options.gpus_per_task}
    if not fitting([node["Resources"] for node in alive_nodes()], bundle):
        raise ResourceError(
            f"no node of the cluster has {bundle['CPU']:g} CPUs and {bundle['GPU']:g} GPUs for a unit of work: lower "
            "selection.cpus_per_task or selection.gpus_per_task, or add nodes"
        )


def _run(row: dict[str, Any], function: Callable[[int], object], starts: Path) -> dict[str, Any]:
    # An error travels back as data: an exception would be wrapped by Ray.
    error, failed = "", False
    try:
        started = starts / str(row["number"])
        _count_start(started)
        function(int(row["number"]))
        started.unlink(missing_ok=True)
    except DwmError as raised:
        error, failed = str(raised), isinstance(raised, TrainingError)
    except OSError as raised:
        what = " ".join(str(part) for part in (raised.strerror or raised, raised.filename) if part)
        error = f"{what}: free space, or use folders that all nodes can read and write"
    except (MemoryError, RuntimeError) as raised:
        if not isinstance(raised, MemoryError) and type(raised).__name__ != "OutOfMemoryError":  # torch's
            raise
        reason = str(raised).partition("\n")[0] or "on the host"
        error, failed = f"out of memory ({reason}): lower {_HUNGRY}", True
    return {"error": error, "failed": failed, "host": socket.gethostname()}


def _count_start(path: Path) -> None:
    with path.open("a") as stream:
        stream.write(".")
    if path.stat().st_size > _MOST_STARTS:
        raise TrainingError(
            f"a task's process was killed {_MOST_STARTS} times: if it was for memory, lower {_HUNGRY}; the same "
            "command continues"
        )


def _raised(name: str, row: dict[str, Any]) -> DwmError:
    where = "" if row["host"] == socket.gethostname() else f" on node {row['host']}, which must see what others see"
    return (TrainingError if row["failed"] else DataError)(f"{name}{where}: {row['error']}")


_ROWS = "rows.npy"


def _folder_name(name: str, folder: str, rows: NDArray[np.int64] | None) -> str:
    """Readable, and another one for every function, set and choice of rows: their blocks must never be mixed up."""
    digest = hashlib.sha256(f"{name}\n{folder}".encode())
    if rows is not None:
        digest.update(np.ascontiguousarray(rows).data)
    return f"{''.join(c if c.isalnum() else '-' for c in name)[:64]}-{digest.hexdigest()[:12]}"


def _path(results: Path, size: int, number: int) -> Path:
    """Where the result of a block of so many rows lies; blocks of another size have other names."""
    return results / f"{size}-{number:07d}.npz"


def _write_block(number: int, *, function: RowFunction, folder: str, chosen: bool, results: Path, size: int) -> None:
    reader, part = open_shards(folder), slice(number * size, (number + 1) * size)
    if chosen:
        rows = np.asarray(np.load(results / _ROWS, mmap_mode="r", allow_pickle=False)[part])
    else:
        rows = np.arange(part.start, min(part.stop, reader.manifest.rows))
    save_arrays(_path(results, size, number), function(reader.take(rows)))
