"""Results on tasks are read as evaluations keep them."""

from __future__ import annotations

from pathlib import Path

from synthetic_runs import write_run

from ray_dwm.analysis.results import scores, task_table
from ray_dwm.analysis.runs import Run, open_run
from ray_dwm.evaluation.scores import Evaluation, Score, keep

OWN = {"lm": "0", "tokens": 1, "batch": 1, "device": "cpu", "versions": {}, "tasks": {}}


def score(metric: str, value: float, error: float | None, better: bool | None) -> Score:
    own = {"task": "arc", "shots": 0, "n": 20, "truncated": 0, "version": "1.0"}
    return Score(metric=metric, value=value, error=error, higher_is_better=better, **own)


def evaluated(root: Path, name: str, value: float) -> Run:
    run = open_run(write_run(root, name, method="uniform", final=3.0))
    new = [score("acc", value, 0.01, True), score("ppl", 8.0, None, False)]
    for step, found in ((10, new), (5, [score("acc", 0.0, 0.01, True)])):
        keep(run.folder, Evaluation(step=step, scores=found, **OWN))
    return run


def test_the_last_evaluation_of_runs_and_methods(tmp_path: Path) -> None:
    runs = [evaluated(tmp_path, name, value) for name, value in (("a", 0.5), ("b", 0.25))]
    bare = open_run(write_run(tmp_path, "c", method="uniform", final=3.0))
    table = task_table({"one": runs[:1], "none": [bare], "both": runs})
    assert table is not None and table.header == ("task", "metric", "shots", "one", "none", "both")
    # Two seeds, 0.5 and 0.25: 12.7062 times 0.125 is half of the interval.
    assert table.rows == (
        ("arc", "acc", "0", "0.5000 ± 0.0100", "", "0.3750 ± 1.5883"),
        ("arc", "ppl ↓", "0", "8.0000", "", "8.0000 ± 0.0000"),
    )
    assert task_table({"none": [bare]}) is None and scores(bare) == {}


def test_what_a_checkpoint_scored_is_not_what_the_finished_lm_would(tmp_path: Path) -> None:
    """The evaluation at the end failed, or was never made."""
    ended = evaluated(tmp_path, "a", 0.5)
    early = open_run(write_run(tmp_path, "b", method="uniform", final=3.0))
    keep(early.folder, Evaluation(step=5, scores=[score("acc", 0.9, 0.01, True)], **OWN))
    assert scores(early) == {}
    table = task_table({"ended": [ended], "early": [early]})
    assert table is not None and [row[3:] for row in table.rows] == [("0.5000 ± 0.0100", ""), ("8.0000", "")]
