"""Results on tasks and overlaps are read as they were written, and damage is one clear line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from synthetic_runs import write_run

from ray_dwm.analysis.results import Overlap, overlaps, scores, task_table
from ray_dwm.analysis.runs import Run, open_run
from ray_dwm.errors import DataError


def evaluated(root: Path, name: str, value: float) -> Run:
    run = open_run(write_run(root, name, method="uniform", final=3.0))
    of_task = {"task": "arc", "metric": "acc,none", "shots": 0, "error": 0.01, "higher_is_better": True}
    old, new = ({"scores": [{**of_task, "value": v}]} for v in (0.0, value))
    new["scores"].append({**of_task, "metric": "ppl", "error": None, "higher_is_better": False, "value": 8.0})
    (run.folder / "evaluation.json").write_text(json.dumps({"evaluations": [old, new]}))
    return run


def test_the_last_evaluation_of_runs_and_methods(tmp_path: Path) -> None:
    runs = [evaluated(tmp_path, name, value) for name, value in (("a", 0.5), ("b", 0.25))]
    bare = open_run(write_run(tmp_path, "c", method="uniform", final=3.0))
    table = task_table({"one": runs[:1], "none": [bare], "both": runs})
    assert table is not None and table.header == ("task", "metric", "shots", "one", "none", "both")
    # Two seeds, 0.5 and 0.25: 12.7062 times 0.125 is half of the interval.
    assert table.rows == (
        ("arc", "acc,none", "0", "0.5000 ± 0.0100", "", "0.3750 ± 1.5883"),
        ("arc", "ppl ↓", "0", "8.0000", "", "8.0000 ± 0.0000"),
    )
    assert task_table({"none": [bare]}) is None and overlaps(bare) is None


def test_overlaps_of_both_files(tmp_path: Path) -> None:
    run = open_run(write_run(tmp_path, "u", method="uniform", final=3.0))
    path, kept = run.folder / "evaluation.json", {"what": "arc", "against": "the training set", "overlapping": 3}
    path.write_text(json.dumps({"evaluations": []}))
    assert overlaps(run) is None and scores(run) == {}
    path.write_text(json.dumps({"evaluations": [], "overlaps": [{**kept, "judged": 60}]}))
    assert overlaps(run) == [Overlap("arc", "the training set", 0.05, 0.01)]
    of_set = {"name": "target", "against": "train", "overlap": 0.5, "threshold": 0.2}
    (run.folder / "contamination.json").write_text(json.dumps({"sets": [of_set]}))
    assert overlaps(run) == [Overlap("target", "train", 0.5, 0.2), Overlap("arc", "the training set", 0.05, 0.01)]


@pytest.mark.parametrize(
    ("name", "read", "content"),
    [
        ("contamination.json", overlaps, {"sets": [{"name": "test"}]}),
        ("contamination.json", overlaps, {"sets": 3}),
        ("evaluation.json", scores, {"evaluations": [{"scores": [{"task": "arc"}]}]}),
        ("evaluation.json", scores, {}),
    ],
)
def test_damage_names_the_file(tmp_path: Path, name: str, read: Callable[[Run], Any], content: object) -> None:
    run = open_run(write_run(tmp_path, "u", method="uniform", final=3.0))
    (run.folder / name).write_text(json.dumps(content))
    with pytest.raises(DataError, match=f"{name} is damaged"):
        read(run)
