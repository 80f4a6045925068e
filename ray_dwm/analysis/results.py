"""What was measured of a finished run afterwards: results on tasks, and how far sets are contaminated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ray_dwm.analysis.runs import Run
from ray_dwm.analysis.statistics import interval
from ray_dwm.analysis.tables import Table
from ray_dwm.evaluation.scores import Score, read_evaluations

Key = tuple[str, str, int]
"""Task, metric, examples in the context."""


def scores(run: Run) -> dict[Key, Score]:
    """The scores that are kept of the finished LM; empty where there are none, whatever checkpoints before it have.

    Raises:
        DataError: evaluation.json is damaged.
    """
    last = [of for of in read_evaluations(run.folder) if of.step == run.summary["steps"]]
    return {(score.task, score.metric, score.shots): score for of in last for score in of.scores}


def task_table(groups: Mapping[str, Sequence[Run]]) -> Table | None:
    """Scores of finished LMs, or means over the seeds of methods; None where none was evaluated.

    Of one run ± is the standard error over a task's items, of several half of the 95 % interval over seeds.
    """
    found = {label: [scores(run) for run in runs] for label, runs in groups.items()}
    keys = list(dict.fromkeys(key for of_runs in found.values() for of in of_runs for key in of))
    if not keys:
        return None
    rows = []
    for key in keys:
        having = {label: [of[key] for of in of_runs if key in of] for label, of_runs in found.items()}
        less = any(score.higher_is_better is False for of in having.values() for score in of)
        rows.append((key[0], key[1] + (" ↓" if less else ""), str(key[2]), *(_told(of) for of in having.values())))
    return Table("Tasks", ("task", "metric", "shots", *found), tuple(rows), 2)


def _told(of: Sequence[Score]) -> str:
    if not of:
        return ""
    mean = interval([score.value for score in of])
    spread = of[0].error if len(of) == 1 else mean.half
    return f"{mean.mean:.4f}" + (f" ± {spread:.4f}" if spread is not None else "")
