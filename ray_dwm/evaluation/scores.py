"""What tasks say of an LM, as data: in a run folder's evaluation.json, as a table, as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from ray_dwm.data.records import read_json, write_whole
from ray_dwm.errors import DataError
from ray_dwm.evaluation.contamination import Overlap

EVALUATION = "evaluation.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """One figure of lm-eval's for one task."""

    task: str
    metric: str
    """As lm-eval names it; its filter behind a comma, where it has one."""
    shots: int
    """Examples in the context, as lm-eval counts them: a task may fix their number."""
    value: float
    error: float | None
    """Standard error, lm-eval's; None where it knows none for the metric."""
    n: int
    """Items."""
    truncated: int
    """Items of which an input was longer than the LM's context, so that lm-eval cut it on the left."""
    higher_is_better: bool | None
    version: str
    """Of the task."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """Tasks of one LM, all scored alike."""

    lm: str
    """SHA-256 over its weights."""
    step: int | None
    """Training steps of the LM; None where it is no run's."""
    tokens: int | None
    batch: int
    device: str
    versions: Mapping[str, str]
    tasks: Mapping[str, str]
    """Name of each task file's task -> SHA-256 of the file."""
    scores: Sequence[Score]


def to_dict(evaluation: Evaluation) -> dict[str, Any]:
    """Plain values, for JSON."""
    return asdict(evaluation)


def from_dict(values: Mapping[str, Any]) -> Evaluation:
    """What `to_dict` gave."""
    return Evaluation(**{**values, "scores": [Score(**score) for score in values["scores"]]})


def read_evaluations(run_dir: Path) -> list[Evaluation]:
    """What is kept of a run, in the order of steps.

    Raises:
        DataError: evaluation.json is damaged.
    """
    return _read(run_dir)[0]


def read_overlaps(run_dir: Path) -> list[Overlap]:
    """The guard's findings that are kept of a run.

    Raises:
        DataError: evaluation.json is damaged.
    """
    return _read(run_dir)[1]


def _read(run_dir: Path) -> tuple[list[Evaluation], list[Overlap]]:
    path = run_dir / EVALUATION
    if not path.is_file():
        return [], []
    try:
        content = read_json(path)
        evaluations = [from_dict(values) for values in content["evaluations"]]
        return evaluations, [Overlap(**values) for values in content.get("overlaps", [])]
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error}): remove it and evaluate anew") from None


def keep(run_dir: Path, evaluation: Evaluation | None, overlaps: Iterable[Overlap] = ()) -> None:
    """Add to a run's evaluation.json; a score takes the place of that of the same step, task and shots.

    Raises:
        DataError: evaluation.json is damaged.
    """
    kept, known = _read(run_dir)
    if evaluation is not None:
        made = {(score.task, score.shots) for score in evaluation.scores}
        kept = [_without(old, made) if old.step == evaluation.step else old for old in kept]
        kept = sorted([*(old for old in kept if old.scores), evaluation], key=lambda each: each.step or 0)
    found = {(of.what, of.against): of for of in (*known, *overlaps)}
    content = {"evaluations": list(map(to_dict, kept)), "overlaps": list(map(asdict, found.values()))}
    write_whole(run_dir / EVALUATION, json.dumps(content, indent=2) + "\n")


def _without(evaluation: Evaluation, made: set[tuple[str, int]]) -> Evaluation:
    left = [score for score in evaluation.scores if (score.task, score.shots) not in made]
    return from_dict({**to_dict(evaluation), "scores": [asdict(score) for score in left]})


def with_error(score: Score) -> str:
    """A value and its standard error."""
    return f"{score.value:.4f} ± {'n/a' if score.error is None else f'{score.error:.4f}'}"


def table(evaluation: Evaluation) -> Table:
    """Scores for the terminal; ↓ marks a metric of which less is better."""
    shown = Table()
    for name in ("task", "metric"):
        shown.add_column(name)
    for name in ("shots", "value ± s.e.", "items", "cut"):
        shown.add_column(name, justify="right", no_wrap=True)
    for score in evaluation.scores:
        metric = score.metric + (" ↓" if score.higher_is_better is False else "")
        figures = (str(score.shots), with_error(score), str(score.n), str(score.truncated))
        shown.add_row(score.task, metric, *figures)
    told = ", ".join(f"{name} {version}" for name, version in evaluation.versions.items())
    shown.caption = f"{told}; batch {evaluation.batch} on {evaluation.device}"
    return shown
