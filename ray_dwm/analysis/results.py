"""What was measured of a finished run afterwards: results on tasks, and how far sets are contaminated."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ray_dwm.analysis.runs import Run
from ray_dwm.analysis.statistics import interval
from ray_dwm.analysis.tables import Table
from ray_dwm.data.records import read_json
from ray_dwm.errors import DataError
from ray_dwm.sections import MAX_OVERLAP

CONTAMINATION = "contamination.json"
EVALUATION = "evaluation.json"
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Overlap:
    """How much of one set is also in another."""

    name: str
    against: str
    overlap: float
    """Part of the set, 0 to 1."""
    threshold: float
    """From which on it counts as contaminated."""


@dataclass(frozen=True, slots=True)
class Score:
    """One figure of one task."""

    value: float
    error: float | None
    """Standard error over items, where one is known."""
    lower_is_better: bool


def overlaps(run: Run) -> list[Overlap] | None:
    """What contamination.json and evaluation.json say; None where nobody has looked.

    Raises:
        DataError: one of them is damaged.
    """
    found = [*_read(run, CONTAMINATION, "sets", _set), *_read(run, EVALUATION, "overlaps", _items, needed=False)]
    return found if found or (run.folder / CONTAMINATION).is_file() else None


def _set(of: Mapping[str, Any]) -> Overlap:
    return Overlap(str(of["name"]), str(of["against"]), float(of["overlap"]), float(of["threshold"]))


def _items(of: Mapping[str, Any]) -> Overlap:
    """Of those items that are long enough to tell."""
    share = int(of["overlapping"]) / max(1, int(of["judged"]))
    return Overlap(str(of["what"]), str(of["against"]), share, MAX_OVERLAP)


def _read(run: Run, name: str, key: str, made: Callable[[Any], T], needed: bool = True) -> list[T]:
    """The entries of a list in a JSON file of the run folder; none where there is no such file."""
    path = run.folder / name
    if not path.is_file():
        return []
    try:
        content = read_json(path)
        return [made(of) for of in (content[key] if needed else content.get(key, []))]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} is damaged ({error!r}): remove it, and evaluate again") from None


def scores(run: Run) -> dict[tuple[str, str, int], Score]:
    """(task, metric, examples in the context) -> score, by evaluation.json's evaluations of the last step; or empty.

    Raises:
        DataError: it is damaged.
    """
    evaluations = _read(run, EVALUATION, "evaluations", lambda of: (of.get("step"), _scores(of)))
    return {key: score for step, found in evaluations if step == evaluations[-1][0] for key, score in found.items()}


def _scores(evaluation: Mapping[str, Any]) -> dict[tuple[str, str, int], Score]:
    return {_key(of): _score(of) for of in evaluation["scores"]}


def _key(of: Mapping[str, Any]) -> tuple[str, str, int]:
    return str(of["task"]), str(of["metric"]), int(of["shots"])


def _score(of: Mapping[str, Any]) -> Score:
    error = of["error"]
    return Score(float(of["value"]), None if error is None else float(error), of["higher_is_better"] is False)


def task_table(groups: Mapping[str, Sequence[Run]]) -> Table | None:
    """Scores of runs, or means over the seeds of methods; None where nothing was evaluated.

    Of one run ± is the standard error over a task's items, of several half of the 95 % interval over seeds.
    """
    found = {label: [scores(run) for run in runs] for label, runs in groups.items()}
    keys = list(dict.fromkeys(key for of_runs in found.values() for of in of_runs for key in of))
    if not keys:
        return None
    rows = []
    for key in keys:
        having = {label: [of[key] for of in of_runs if key in of] for label, of_runs in found.items()}
        less = any(score.lower_is_better for of in having.values() for score in of)
        rows.append((key[0], key[1] + (" ↓" if less else ""), str(key[2]), *(_told(of) for of in having.values())))
    return Table("Tasks", ("task", "metric", "shots", *found), tuple(rows), 2)


def _told(of: Sequence[Score]) -> str:
    if not of:
        return ""
    mean = interval([score.value for score in of])
    spread = of[0].error if len(of) == 1 else mean.half
    return f"{mean.mean:.4f}" + (f" ± {spread:.4f}" if spread is not None else "")
