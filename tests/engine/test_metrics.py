"""Logs that a restart leaves without gaps or repeats."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ray_dwm.data.records import read_metrics
from ray_dwm.engine.metrics import JsonlSink, WeightsWriter
from ray_dwm.errors import DataError


def test_resuming_cuts_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, 0)
    for step in range(1, 6):
        sink.log({"step": step, "loss": float(step)})
    sink.close(1)
    with path.open("a") as stream:
        stream.write('{"step": 6, "lo')  # a crash in mid-line
    sink = JsonlSink(path, 3)
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    sink.log({"step": 4, "loss": 0.5})
    sink.close(0)
    assert [(line["step"], line["loss"]) for line in read_metrics(path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 0.5)]


def test_damage_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\ngarbage\n{"step": 3}\n')
    with pytest.raises(DataError, match="line 2 is damaged"):
        read_metrics(path)


def test_weights_after_the_checkpoint_are_written_anew(tmp_path: Path) -> None:
    def steps(writer: WeightsWriter, first: int, last: int) -> None:
        for step in range(first, last + 1):
            writer.add(step, [step * 10, step * 10 + 1], [0, 1], [1.0, 2.0], [0.0, 0.1], [0.9, 1.1])

    writer = WeightsWriter(tmp_path, ["a", "b"], 0)
    steps(writer, 1, 3)
    writer.flush(3)
    steps(writer, 4, 6)
    writer.flush(6)
    writer = WeightsWriter(tmp_path, ["a", "b"], 3)
    steps(writer, 4, 5)
    writer.flush(5)
    table = pq.read_table(tmp_path)
    assert sorted(table["step"].to_pylist()) == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert set(table["domain"].to_pylist()) == {"a", "b"}
    assert not list(tmp_path.glob("*.tmp"))
