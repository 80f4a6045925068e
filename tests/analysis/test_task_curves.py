"""Scores over training in the report, and that its table reads what an evaluation keeps."""

from __future__ import annotations

from pathlib import Path

from synthetic_runs import TOKENS, write_run

from ray_dwm.analysis.report import write_report
from ray_dwm.analysis.results import scores
from ray_dwm.analysis.runs import open_run
from ray_dwm.analysis.task_curves import task_curves
from ray_dwm.evaluation.contamination import Overlap
from ray_dwm.evaluation.scores import Evaluation, Score, keep, read_overlaps


def evaluation(step: int, task: str = "sea", **values: float) -> Evaluation:
    """Scores of a task whose metrics are named."""
    made = [
        Score(
            task=task,
            metric=metric,
            shots=0,
            value=value,
            error=0.05,
            n=20,
            truncated=1,
            higher_is_better=metric == "acc",
            version="1.0",
        )
        for metric, value in values.items()
    ]
    return Evaluation(
        lm="0", step=step, tokens=step * TOKENS, batch=32, device="cpu", versions={}, tasks={}, scores=made
    )


def test_a_figure_where_there_are_scores_of_several_steps(tmp_path: Path) -> None:
    uniform = write_run(tmp_path, "u", method="uniform", final=3.0)
    weighted = write_run(tmp_path, "d", method="dwm", final=2.5)
    assert task_curves([open_run(uniform), open_run(weighted)]) == []
    keep(uniform, evaluation(10, acc=0.25))
    for step, value in ((10, 0.5), (5, 0.375)):
        keep(weighted, evaluation(step, acc=value))
    curves = task_curves([open_run(uniform), open_run(weighted)])
    assert [title for title, _ in curves] == ["sea, acc, 0 shots"]
    write_report([uniform, weighted], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<h3>sea, acc, 0 shots</h3>" in page


def test_the_reports_table_has_what_was_kept(tmp_path: Path) -> None:
    run = write_run(tmp_path, "u", method="uniform", final=3.0)
    overlap = Overlap(what="sea", against="the training set", items=20, judged=20, overlapping=1, words=13, of="digest")
    keep(run, evaluation(5, acc=0.125), [overlap])
    keep(run, evaluation(10, acc=0.25))
    keep(run, evaluation(10, task="sky", acc=0.75))  # asked for later
    found = scores(open_run(run))
    assert {key: (score.value, score.error) for key, score in found.items()} == {
        ("sea", "acc", 0): (0.25, 0.05),
        ("sky", "acc", 0): (0.75, 0.05),
    }
    assert read_overlaps(run) == [overlap] and overlap.share == 0.05
