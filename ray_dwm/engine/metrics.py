"""Where a run's figures go. Sinks are called on rank 0 only and survive a restart without gaps or repeats."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from ray_dwm.data.records import read_metrics, write_whole

Metrics = Mapping[str, float]

WEIGHTS_SCHEMA = pa.schema(
    [
        ("step", pa.int64()),
        ("sample_id", pa.int64()),
        ("domain", pa.string()),
        ("loss", pa.float32()),
        ("score", pa.float32()),
        ("weight", pa.float32()),
    ]
)


class MetricSink(Protocol):
    """Takes one mapping a step."""

    def log(self, metrics: Metrics) -> None:
        """Take a step's figures; `step` counts completed steps."""
        ...

    def close(self, exit_code: int) -> None:
        """The run has ended."""
        ...


class JsonlSink:
    """metrics.jsonl: a line a step. Lines after the resumed step are cut off, so a restart leaves no trace."""

    def __init__(self, path: Path, resume_step: int) -> None:
        # A run that starts anew logs its step 0 again.
        kept = [x for x in read_metrics(path) if x["step"] <= resume_step] if resume_step and path.exists() else []
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._stream = path.open("a")

    def log(self, metrics: Metrics) -> None:
        """See MetricSink."""
        self._stream.write(json.dumps(metrics) + "\n")
        self._stream.flush()

    def close(self, exit_code: int) -> None:
        """See MetricSink."""
        del exit_code
        self._stream.close()


class WeightsWriter:
    """weights/*.parquet: every sample's score and weight, one file per checkpoint interval."""

    def __init__(self, folder: Path, domains: Sequence[str], resume_step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for part in folder.glob("*.parquet"):
            if int(part.stem.rsplit("-", 1)[1]) > resume_step:
                part.unlink()
        self._folder, self._domains = folder, domains
        self._tables: list[pa.Table] = []
        self._first = resume_step + 1

    def add(
        self,
        step: int,
        ids: Sequence[int],
        domains: Sequence[int],
        losses: Sequence[float],
        scores: Sequence[float],
        weights: Sequence[float],
    ) -> None:
        """Buffer one step's global batch."""
        names = [self._domains[code] for code in domains]
        columns = [[step] * len(ids), ids, names, losses, scores, weights]
        self._tables.append(pa.table(columns, schema=WEIGHTS_SCHEMA))

    def flush(self, step: int) -> None:
        """Write what is buffered; called with every checkpoint, after `step` steps."""
        if self._tables:
            path = self._folder / f"weights-{self._first:09d}-{step:09d}.parquet"
            temporary = path.with_suffix(".tmp")
            pq.write_table(pa.concat_tables(self._tables), temporary)
            os.replace(temporary, path)
            self._tables.clear()
        self._first = step + 1
