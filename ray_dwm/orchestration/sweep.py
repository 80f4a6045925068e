"""All rows of a set through a function on Ray Data, block by block; finished blocks survive an interruption."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from ray_dwm.data.manifest import load_manifest
from ray_dwm.data.records import replacing
from ray_dwm.data.shards import open_shards
from ray_dwm.errors import DataError, DwmError, TrainingError
from ray_dwm.selecting import SelectionConfig
from ray_dwm.selection.method import Arrays, RowFunction

_TELL_S = 10.0


class RaySweep:
    """A Sweep (see selection/method.py) whose results lie in a folder that all nodes see."""

    def __init__(self, work: Path, options: SelectionConfig, title: str = "") -> None:
        """Results go to `work`; what is told begins with the title."""
        self._work, self.options, self._title = work, options, title

    def __call__(
        self, name: str, folder: str, function: RowFunction, rows: NDArray[np.int64] | None = None, block: int = 0
    ) -> Iterator[Arrays]:
        """See Sweep.

        Raises:
            UserError, TrainingError: what the function raised for a block; the others' results stay.
        """
        results = self._work / _file_name(name)
        results.mkdir(parents=True, exist_ok=True)
        manifest = load_manifest(folder)
        size = block or max(1, self.options.block_tokens // manifest.seq_len)
        total, numbers = manifest.rows if rows is None else len(rows), ""
        if rows is not None:
            numbers = str(results / "rows.npy")
            with replacing(Path(numbers)) as temporary, temporary.open("wb") as stream:
                np.save(stream, rows)
        blocks = [_Block(start, min(start + size, total)) for start in range(0, total, size)]
        missing = [block for block in blocks if not block.path(results).exists()]
        if missing:
            options = {"folder": folder, "function": function, "results": str(results), "rows": numbers}
            self._map(name, [asdict(block) for block in missing], _run_block, options, len(blocks) - len(missing))
        for block_of_rows in blocks:
            yield read_arrays(block_of_rows.path(results))

    def each(self, name: str, numbers: list[int], function: Callable[[int], object]) -> None:
        """Run a function, which writes what it makes, on each of some numbers."""
        if numbers:
            self._map(name, [{"number": number} for number in numbers], _run_item, {"function": function}, 0)

    def _map(
        self, name: str, items: list[dict[str, Any]], function: Callable[..., dict[str, Any]], options: Any, done: int
    ) -> None:
        o = self.options
        resources: dict[str, Any] = {"num_cpus": o.cpus_per_task}
        if o.gpus_per_task:
            resources["num_gpus"] = o.gpus_per_task
        elif ray.cluster_resources().get("GPU"):  # else every task would take its node's first one
            resources["runtime_env"] = {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}
        mapped = ray.data.from_items(items, override_num_blocks=len(items)).map(
            function,
            fn_kwargs=options,
            compute=ray.data.TaskPoolStrategy(size=min(o.tasks, len(items))),
            **resources,
        )
        told = _Told(self._title + name, done + len(items), done)
        for row in mapped.iter_rows():
            if row["error"]:
                raise (TrainingError if row["failed"] else DataError)(row["error"])
            told.one()


class _Told:
    """Says now and then how far it is."""

    def __init__(self, name: str, total: int, done: int) -> None:
        self._name, self._total, self._start, self._done = name, total, done, done
        self._began = self._last = time.monotonic()
        before = f", {done} are there from before" if done else ""
        if total > 1:
            print(f"{name}: {total} blocks{before}", flush=True)  # the first one may take minutes

    def one(self) -> None:
        """One more is done."""
        self._done += 1
        now = time.monotonic()
        if now - self._last < _TELL_S and self._done < self._total:
            return
        self._last = now
        passed = now - self._began
        left = int(passed / (self._done - self._start) * (self._total - self._done))
        end = f"{left // 60}:{left % 60:02d} left" if left else f"{passed:.0f} s"
        print(f"{self._name}: {self._done} of {self._total} blocks, {end}", flush=True)


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows start .. stop - 1 of those that are visited."""

    start: int
    stop: int

    def path(self, results: Path) -> Path:
        """Where its result lies; blocks of another size have other names."""
        return results / f"{self.start:012d}-{self.stop - self.start}.npz"


def _run_block(item: dict[str, Any], folder: str, function: RowFunction, results: str, rows: str) -> dict[str, Any]:
    # An error travels back as data: an exception would be wrapped and retried by Ray.
    block = _Block(**item)
    try:
        numbers = np.arange(block.start, block.stop)
        if rows:
            numbers = np.load(rows, mmap_mode="r", allow_pickle=False)[block.start : block.stop]
        write_arrays(block.path(Path(results)), function(open_shards(folder).take(np.asarray(numbers))))
    except (DwmError, OSError) as error:
        return _problem(error)
    return {"error": ""}


def _run_item(row: dict[str, Any], function: Callable[[int], object]) -> dict[str, Any]:
    try:
        function(int(row["number"]))
    except (DwmError, OSError) as error:
        return _problem(error)
    return {"error": ""}


def _problem(error: Exception) -> dict[str, Any]:
    return {"error": str(error), "failed": isinstance(error, TrainingError)}


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Write named arrays; the file appears whole."""
    with replacing(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **arrays)


def read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read named arrays."""
    with np.load(path, allow_pickle=False) as stored:
        return dict(stored)


def _file_name(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)
