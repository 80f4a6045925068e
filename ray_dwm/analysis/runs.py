"""Run folders as plain data."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ray_dwm.config import RunConfig, load
from ray_dwm.data.records import read_json, read_metrics
from ray_dwm.errors import UserError


@dataclass(frozen=True)
class Run:
    """A run folder, read when asked."""

    folder: Path
    called: str = ""
    """What it is called among others; empty: its own name."""

    @cached_property
    def config(self) -> RunConfig:
        """The resolved configuration."""
        return load([self.folder / "config.yaml"])

    @cached_property
    def summary(self) -> dict[str, Any]:
        """summary.json."""
        return read_json(self.folder / "summary.json")

    @cached_property
    def metrics(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl."""
        return read_metrics(self.folder / "metrics.jsonl")

    @property
    def name(self) -> str:
        """The run's name."""
        return self.called or self.config.name

    @property
    def weighted(self) -> bool:
        """Whether a DWM or a baseline gave the weights."""
        return self.config.weighting.method != "uniform"

    @property
    def label(self) -> str:
        """What gave the weights."""
        return self.config.weighting_label

    def series(self, key: str, over: str = "tokens") -> tuple[list[float], list[float]]:
        """(x, y) of a metric over `tokens`, `step` or `time_s`, where it was logged."""
        points = [(line[over], line[key]) for line in self.metrics if key in line]
        return [x for x, _ in points], [y for _, y in points]

    def keys(self, prefix: str) -> list[str]:
        """Metric names with a prefix, in order of first appearance."""
        return list(dict.fromkeys(key for line in self.metrics for key in line if key.startswith(prefix)))

    def weights(self) -> pa.Table:
        """All rows of weights/*.parquet; none where they were uniform."""
        files = sorted((self.folder / "weights").glob("*.parquet"))
        try:
            return pa.concat_tables([pq.read_table(file) for file in files]) if files else pa.table({})
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self.folder / 'weights'} is damaged ({str(error).splitlines()[0]})") from None


def versions() -> dict[str, str]:
    """Of what decides the figures; `commit` where this is a checkout."""
    found = {name: version(name) for name in ("ray-dwm", "torch", "ray", "transformers", "pyarrow", "numpy")}
    commit = _commit()
    return {**found, "commit": commit} if commit else found


@lru_cache(maxsize=1)
def _commit() -> str:
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        asked = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def open_run(folder: Path) -> Run:
    """A finished run.

    Raises:
        UserError: where the folder is none, or what it holds is damaged.
    """
    for name in ("config.yaml", "metrics.jsonl", "summary.json"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}: it is no finished run folder, let `ray-dwm train` end first")
    run = Run(folder)
    missing = {"tokens", "steps", "workers", "train_seconds", "overhead_frac", "seconds", "final"} - run.summary.keys()
    if missing:
        raise UserError(f"{folder / 'summary.json'} has no {min(missing)}: it is damaged or of another version")
    if run.weighted and not len(run.weights()):
        raise UserError(f"{folder / 'weights'} has no weights: the run folder is not whole")
    return run


def open_runs(folders: Sequence[Path]) -> list[Run]:
    """Finished runs, each under a name of its own: where names are the same, folders above them tell them apart.

    Raises:
        UserError: as of `open_run`; or a folder is named twice.
    """
    runs, paths = [open_run(folder) for folder in folders], [folder.absolute().resolve() for folder in folders]
    twice = next((folder for folder, path in zip(folders, paths, strict=True) if paths.count(path) > 1), None)
    if twice is not None:
        raise UserError(f"run folder {twice} is named twice: name it once")
    names, parts = [run.name for run in runs], 1
    while len(set(names)) < len(names):
        parts += 1
        names = ["/".join(path.parts[-parts:]) for path in paths]
    return [Run(run.folder, name) for run, name in zip(runs, names, strict=True)]
