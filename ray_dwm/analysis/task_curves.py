"""Figures of the report: scores in tasks over training, of runs that were evaluated while they trained."""

from __future__ import annotations

from collections.abc import Sequence

from ray_dwm.analysis import figures
from ray_dwm.analysis.runs import Run
from ray_dwm.evaluation.scores import Evaluation, Score, read_evaluations

_Key = tuple[str, str, int]


def task_curves(runs: Sequence[Run]) -> list[tuple[str, str]]:
    """(title, figure) of each task, metric and number of shots of which a run has scores of several steps.

    Raises:
        DataError: an evaluation.json is damaged.
    """
    found = [_of_run(run) for run in runs]
    curves = []
    for key in dict.fromkeys(key for scores in found for key in scores):
        lines = [(run, scores.get(key, [])) for run, scores in zip(runs, found, strict=True)]
        if any(len(points) > 1 for _, points in lines):
            task, metric, shots = key
            curves.append((f"{task}, {metric}, {shots} shots", figures.scores(lines, metric)))
    return curves


def _of_run(run: Run) -> dict[_Key, list[tuple[Evaluation, Score]]]:
    """(task, metric, shots) -> its scores in the order of steps."""
    found: dict[_Key, list[tuple[Evaluation, Score]]] = {}
    for evaluation in read_evaluations(run.folder):
        for score in evaluation.scores:
            found.setdefault((score.task, score.metric, score.shots), []).append((evaluation, score))
    return found
