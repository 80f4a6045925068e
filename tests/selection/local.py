"""A sweep in this process, and a task for it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_dwm.config import build
from ray_dwm.config.selection import SelectionConfig
from ray_dwm.data.manifest import load_manifest
from ray_dwm.data.shards import open_shards
from ray_dwm.selection.method import Arrays, RowFunction, Task


def sweep(
    name: str,
    folder: str,
    function: RowFunction,
    rows: NDArray[np.int64] | None = None,
    block: int = 0,
    default: int = 50,
) -> Iterator[Arrays]:
    """Blocks of rows, in a loop."""
    reader, size = open_shards(folder), block or default
    numbers = np.arange(reader.manifest.rows) if rows is None else rows
    for start in range(0, len(numbers), size):
        yield function(reader.take(numbers[start : start + size]))


def task(
    pool: Path,
    targets: dict[str, Path],
    seed: int = 0,
    block: int = 50,
    proxies: tuple[Path, ...] = (),
    scratch: str = "",
    **options: Any,
) -> Task:
    """A selection from a pool."""
    return Task(
        options=build(SelectionConfig, options),
        seed=seed,
        pool=load_manifest(pool),
        targets={name: load_manifest(folder) for name, folder in targets.items()},
        sweep=partial(sweep, default=block),
        scratch=scratch,
        proxies=tuple(map(str, proxies)),
    )
