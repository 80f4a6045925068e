"""Evaluating one LM: losses on sets of shards, and tasks, which are loaded, guarded, scored and kept."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from ray_dwm.config import RunConfig, load
from ray_dwm.config.sections import MAX_OVERLAP
from ray_dwm.data.records import read_json, write_whole
from ray_dwm.errors import UserError
from ray_dwm.evaluation.contamination import Overlap, guard, refuse
from ray_dwm.evaluation.harness import Tasks, require_lm
from ray_dwm.evaluation.perplexity import Result, evaluate_folders, format_table
from ray_dwm.evaluation.scores import Evaluation, keep, read_overlaps, table, to_dict
from ray_dwm.logs import width
from ray_dwm.models.folders import RUN_CONFIG


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What is asked of `evaluate`."""

    tasks: Sequence[str] = ()
    shots: Sequence[int] = (0,)
    batch: int = 32
    guarded: bool = True
    max_overlap: float = MAX_OVERLAP
    yaml: Path | None = None
    """Where lm-eval's tasks of the task files are kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Findings:
    """What was found out about an LM."""

    perplexity: Sequence[Result]
    evaluation: Evaluation | None
    overlaps: Sequence[Overlap]


def evaluate(lm: Path, shards: Sequence[Path], asked: Asked) -> Findings:
    """Losses on shards and scores in tasks; without either, losses on the run's own target and held-out sets.

    Raises:
        UserError: naming task, folder or option and the remedy.
    """
    folders = list(shards)
    if not folders and not asked.tasks:
        if (config := origin(lm)) is None:
            raise UserError(f"{lm} is no run folder with sets of its own: name folders of token shards, or --tasks")
        folders = [Path(name).expanduser() for name in config.data.evaluation_sets.values()]
    evaluation, found = judge(lm, asked) if asked.tasks else (None, [])
    losses = evaluate_folders(lm, folders, asked.batch) if folders else []
    return Findings(perplexity=losses, evaluation=evaluation, overlaps=found)


def show(found: Findings) -> None:
    """Print what was found."""
    for overlap in found.overlaps:
        print(overlap)
    if found.evaluation is not None:
        Console(width=width(120)).print(table(found.evaluation))
    if found.perplexity:
        print(format_table(found.perplexity))


def write_json(found: Findings, path: Path) -> None:
    """The same as JSON."""
    content = {
        "perplexity": [asdict(result) for result in found.perplexity],
        "evaluation": to_dict(found.evaluation) if found.evaluation is not None else None,
        "overlaps": [asdict(overlap) for overlap in found.overlaps],
    }
    write_whole(path.absolute(), json.dumps(content, indent=2) + "\n")


def origin(lm: Path) -> RunConfig | None:
    """The configuration that an LM folder was trained with, where it is a run folder or an export of one."""
    for path in (lm / "config.yaml", lm / RUN_CONFIG):
        if path.is_file():
            return load([path])
    return None


def judge(lm: Path, asked: Asked) -> tuple[Evaluation, list[Overlap]]:
    """Score an LM by tasks that it was not trained on; of a run the scores are kept in its folder.

    Returns:
        The scores, and what the guard has found.

    Raises:
        UserError: naming task, folder or option and the remedy; nothing is written.
    """
    require_lm(lm)
    config, found = origin(lm), []
    if asked.guarded and config is None:
        raise UserError(
            f"{lm} does not say what it was trained on, so that tasks cannot be compared with it: pass --no-guard, or "
            "name a run folder"
        )
    finished = lm / "summary.json"
    summary = read_json(finished) if finished.is_file() else {}
    with tempfile.TemporaryDirectory(prefix="ray_dwm.") as folder:
        tasks = Tasks(asked.tasks, asked.yaml or Path(folder))
        tasks.check_shots(asked.shots)
        if asked.guarded and config is not None:
            found = compared(tasks, config, lm)
            refuse(found, asked.max_overlap, "--max-overlap")
        evaluation = tasks.evaluate(
            lm, asked.shots, asked.batch, step=summary.get("steps"), tokens=summary.get("tokens")
        )
    if summary:
        keep(lm, evaluation, found)
    return evaluation, found


def compared(tasks: Tasks, config: RunConfig, run_dir: Path) -> list[Overlap]:
    """What tasks, training set and target sets of a run have in common; what its folder says already is believed.

    Raises:
        DataError: the shards cannot be read.
    """
    return guard(tasks.texts(), config.data.train, config.data.target_sets, read_overlaps(run_dir))
