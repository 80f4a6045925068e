"""The report's section about tasks: the last scores of each run, and how they came about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ray_dwm.analysis import figures
from ray_dwm.analysis.runs import Run
from ray_dwm.evaluation.contamination import Overlap
from ray_dwm.evaluation.scores import Evaluation, Score, read_evaluations, read_overlaps, with_error

_Key = tuple[str, str, int]


def tasks_section(runs: Sequence[Run]) -> dict[str, Any] | None:
    """What report.html shows of evaluation.json; None where no run was evaluated by tasks.

    Raises:
        DataError: an evaluation.json is damaged.
    """
    found = [_of_run(run) for run in runs]
    keys = list(dict.fromkeys(key for scores in found for key in scores))
    if not keys:
        return None
    overlaps = [Overlap(**values) for run in runs for values in read_overlaps(run.folder)]
    curves = []
    for key in keys:
        lines = [(run, scores.get(key, [])) for run, scores in zip(runs, found, strict=True)]
        if any(len(points) > 1 for _, points in lines):
            curves.append((_title(key), figures.scores(lines, key[1])))
    return {
        "runs": [run.name for run in runs],
        "rows": [_row(key, [scores.get(key, []) for scores in found]) for key in keys],
        "curves": curves,
        "overlaps": list(dict.fromkeys(map(str, overlaps))),
    }


def _of_run(run: Run) -> dict[_Key, list[tuple[Evaluation, Score]]]:
    """(task, metric, shots) -> its scores in the order of steps."""
    found: dict[_Key, list[tuple[Evaluation, Score]]] = {}
    for evaluation in read_evaluations(run.folder):
        for score in evaluation.scores:
            found.setdefault((score.task, score.metric, score.shots), []).append((evaluation, score))
    return found


def _title(key: _Key) -> str:
    task, metric, shots = key
    return f"{task}, {metric}, {shots} shots"


def _row(key: _Key, of_runs: Sequence[list[tuple[Evaluation, Score]]]) -> dict[str, Any]:
    task, metric, shots = key
    score = next(points[-1][1] for points in of_runs if points)
    return {
        "task": task,
        "metric": metric + (" ↓" if score.higher_is_better is False else ""),
        "shots": shots,
        "n": score.n,
        "truncated": score.truncated,
        "cells": [_cell(points) for points in of_runs],
    }


def _cell(points: list[tuple[Evaluation, Score]]) -> str:
    if not points:
        return ""
    evaluation, score = points[-1]
    return f"{with_error(score)}, step {evaluation.step}"
