"""The report's section about tasks: the last scores of each run, curves where there are several, overlaps."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from synthetic_runs import TOKENS, write_run

from ray_dwm.analysis.report import write_report
from ray_dwm.analysis.runs import open_run
from ray_dwm.analysis.tasks_section import tasks_section
from ray_dwm.evaluation.contamination import Overlap
from ray_dwm.evaluation.scores import Evaluation, Score, keep


def evaluation(step: int, **values: float) -> Evaluation:
    """Scores of a task whose metrics are named."""
    scores = [
        Score(
            task="sea",
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
        lm="0", step=step, tokens=step * TOKENS, batch=32, device="cpu", versions={}, tasks={}, scores=scores
    )


def test_last_scores_of_each_run_and_how_they_came_about(tmp_path: Path) -> None:
    uniform = write_run(tmp_path, "u", method="uniform", final=3.0)
    weighted = write_run(tmp_path, "d", method="dwm", final=2.5)
    overlap = Overlap(what="sea", against="the training set", items=20, judged=20, overlapping=1, words=13, of="digest")
    keep(uniform, evaluation(10, acc=0.25))
    for step, value in ((10, 0.5), (5, 0.375)):
        keep(weighted, evaluation(step, acc=value, perplexity=9.0), [asdict(overlap)])
    section = tasks_section([open_run(uniform), open_run(weighted)])
    assert section is not None and section["runs"] == ["u", "d"]
    assert [(row["metric"], row["n"], row["truncated"], row["cells"]) for row in section["rows"]] == [
        ("acc", 20, 1, ["0.2500 ± 0.0500, step 10", "0.5000 ± 0.0500, step 10"]),
        ("perplexity ↓", 20, 1, ["", "9.0000 ± 0.0500, step 10"]),
    ]
    assert [title for title, _ in section["curves"]] == ["sea, acc, 0 shots", "sea, perplexity, 0 shots"]
    write_report([uniform, weighted], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Tasks</h2>" in page and "0.5000 ± 0.0500, step 10" in page and str(overlap) in page


def test_runs_without_tasks_have_no_section(tmp_path: Path) -> None:
    run = write_run(tmp_path, "u", method="uniform", final=3.0)
    assert tasks_section([open_run(run)]) is None
    keep(run, evaluation(10, acc=0.25))
    section = tasks_section([open_run(run)])
    assert section is not None and section["curves"] == [] and section["overlaps"] == []
