"""The chosen rows of a selection, written as token shards by tasks."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ray_dwm.data.manifest import DomainStats, Manifest, ShardFile
from ray_dwm.data.records import read_json, save_array, write_whole
from ray_dwm.orchestration.sweep import RaySweep
from ray_dwm.orchestration.work import SHARDS
from ray_dwm.selection.write import ROWS_PER_FILE, shard_name, write_part


def write_rows(
    rows: NDArray[np.int64], pool: Manifest, sweep: RaySweep, work: Path
) -> tuple[tuple[ShardFile, ...], dict[str, DomainStats]]:
    """The chosen rows as shards in the work folder: their files, and what they hold of each domain.

    Parts that are there from before stay, unless they are of other rows: the last bits of scores may depend on where
    they were taken.
    """
    rows_file, reports, shards = work / "rows.npy", work / "parts", work / SHARDS
    if not (rows_file.exists() and np.array_equal(np.load(rows_file), rows)):
        shutil.rmtree(reports, ignore_errors=True)
        save_array(rows_file, rows)
    reports.mkdir(exist_ok=True)
    paths = [reports / f"{number:05d}.json" for number in range(-(-len(rows) // ROWS_PER_FILE))]
    missing = [k for k, path in enumerate(paths) if not (path.exists() and (shards / shard_name(k)).exists())]
    write = partial(_write_part, pool=str(pool.folder), rows_file=str(rows_file), reports=reports, shards=shards)
    sweep.each("writing shards", missing, write, done=len(paths) - len(missing))
    parts = [read_json(path) for path in paths]
    counts = np.sum([part["rows"] for part in parts], axis=0)
    domains = {
        name: DomainStats(
            rows=int(count),
            tokens=int(count) * pool.seq_len,
            bytes_per_token=pool.domains[name].bytes_per_token,  # the whole domain's: texts are not counted again
        )
        for name, count in zip(pool.domain_names, counts, strict=True)
        if count
    }
    return tuple(ShardFile(**part["shard"]) for part in parts), domains


def _write_part(number: int, *, pool: str, rows_file: str, reports: Path, shards: Path) -> None:
    report = write_part(number, pool=pool, rows_file=rows_file, output=shards)
    write_whole(reports / f"{number:05d}.json", json.dumps(report))
