"""An experiment's cells as plain data: what each has reached, and what it cost.

Wall-clock is training time (without evaluation and checkpoints, which are no method's) and, before it, all that the
run needed: selecting, the proxy LMs that selecting looked through, and the runs from which it took something. What is
shared is charged to each: whoever wanted only this one run would have had to pay for it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ray_dwm.analysis.runs import Run, open_run
from ray_dwm.config.experiment import Cell, ExperimentConfig, grid, load_experiment
from ray_dwm.data.records import read_json
from ray_dwm.errors import UserError

EXPERIMENT = "experiment.yaml"
CELLS = "cells"
NOT_BEGUN = "not begun"
_SELECTION = "selection.json"
_DOMAIN_WEIGHTS = "domain_weights.json"


@dataclass(frozen=True, slots=True)
class Curve:
    """A loss over training, point by point."""

    tokens: list[float]
    seconds: list[float]
    """Since the first thing was done for this run."""
    losses: list[float]


@dataclass(frozen=True)
class Outcome:
    """A finished cell."""

    cell: Cell
    run: Run
    selecting_s: float
    """Choosing data, before training and between its stages, with the training of proxy LMs."""
    needed_s: float
    """The runs from which it took something, with what they needed."""
    stages: tuple[tuple[int, float], ...]
    """(step, seconds): what of selecting was done after that step of training."""

    @property
    def tokens(self) -> int:
        """What it trained on."""
        return int(self.run.summary["tokens"])

    @property
    def training_s(self) -> float:
        """Training."""
        return float(self.run.summary["train_seconds"])

    @property
    def wall_s(self) -> float:
        """Everything."""
        return self.needed_s + self.selecting_s + self.training_s

    @property
    def overhead(self) -> float:
        """What weighing adds to the LM's steps."""
        return float(self.run.summary["overhead_frac"])

    @cached_property
    def finals(self) -> dict[str, float]:
        """Evaluation set -> loss over the whole of it at the end."""
        return {key.split("/")[1]: float(value) for key, value in self.run.summary["final"].items()}

    @cached_property
    def digests(self) -> dict[str, str]:
        """Set -> digest of its shards: sets of one name need not be the same."""
        return {name: str(value) for name, value in read_json(self.run.folder / "data.json").items()}

    def curve(self, name: str) -> Curve:
        """The loss of an evaluation set, as it was taken during training."""
        key, before = f"val/{name}/loss", self.needed_s + self.selecting_s - sum(s for _, s in self.stages)
        tokens, losses = self.run.series(key)
        steps, times = self.run.series(key, "step")[0], self.run.series(key, "time_s")[0]
        seconds = [
            before + time + sum(cost for after, cost in self.stages if step > after)
            for step, time in zip(steps, times, strict=True)
        ]
        return Curve(tokens, seconds, losses)


@dataclass(frozen=True)
class Grid:
    """An experiment's folder."""

    experiment: ExperimentConfig
    cells: tuple[Cell, ...]
    outcomes: dict[Cell, Outcome]
    records: dict[Cell, dict[str, Any]]
    """What was written down about cells that have been started."""

    def state(self, cell: Cell) -> str:
        """How far a cell is: done, failed with its reason, or what else."""
        if cell in self.outcomes:
            return "done"
        record = self.records.get(cell, {})
        if record.get("state") == "failed":
            return f"failed: {record['reason']}"
        return "begun, not finished" if record else NOT_BEGUN

    def of(self, size: str, method: str) -> dict[int, Outcome]:
        """Seed -> finished cell, without those that were run again."""
        found = {cell.seed: outcome for cell, outcome in self.outcomes.items() if self._is(cell, size, method)}
        return dict(sorted(found.items()))

    @staticmethod
    def _is(cell: Cell, size: str, method: str) -> bool:
        return (cell.size, cell.method, cell.again) == (size, method, False)


def record_path(folder: Path, cell: Cell) -> Path:
    """Where an experiment writes down how a cell went."""
    return folder / CELLS / f"{cell.path}.json"


def read_grid(folder: Path) -> Grid:
    """All that an experiment's folder holds.

    Raises:
        UserError: it is none, or a run folder in it is damaged.
    """
    if not (folder / EXPERIMENT).is_file():
        raise UserError(f"{folder} has no {EXPERIMENT}: it is no experiment's folder, run `ray-dwm experiment` first")
    experiment = load_experiment(folder / EXPERIMENT)
    cells = grid(experiment)
    records = {cell: read_json(path) for cell in cells if (path := record_path(folder, cell)).is_file()}
    outcomes: dict[Cell, Outcome] = {}
    for cell in cells:  # what is needed comes before what needs it
        if (folder / cell.path / "summary.json").is_file():
            outcomes[cell] = _outcome(folder, cell, records, outcomes)
    return Grid(experiment, tuple(cells), outcomes, records)


def _outcome(folder: Path, cell: Cell, records: dict[Cell, dict[str, Any]], before: dict[Cell, Outcome]) -> Outcome:
    run, record = open_run(folder / cell.path), records.get(cell, {})
    needed = {path: before[path] for path in _needed(cell, records) if path in before}
    own = {outcome.run.folder for outcome in needed.values()}
    stages = tuple(sorted(_stage(path) for path in (run.folder / "stages").glob(f"*/{_SELECTION}")))
    selecting = sum(seconds for _, seconds in stages)
    if record.get("selection"):
        selecting += selection_seconds(Path(record["selection"]), own)
    return Outcome(cell, run, selecting, sum(o.selecting_s + o.training_s for o in needed.values()), stages)


def _needed(cell: Cell, records: dict[Cell, dict[str, Any]]) -> set[Cell]:
    """The cells from which a cell took something, and from which these did."""
    found: set[Cell] = set()
    paths = set(dict(records.get(cell, {}).get("needs", {})).values())
    for other in (c for c in records if c.path in paths):
        found |= {other} | _needed(other, records)
    return found


def _stage(path: Path) -> tuple[int, float]:
    record = read_json(path)
    first = int(record["steps"][0])
    return (first if first else -1, float(record["seconds"]))


def selection_seconds(folder: Path, apart: Collection[Path]) -> float:
    """What a selection cost, with the whole training of its proxy LMs, whoever asked for them first.

    Args:
        apart: run folders whose LMs are counted elsewhere.
    """
    record = read_json(folder / _SELECTION)
    lms = {Path(path) for path in record["folders"]["proxies"]}
    if (folder / _DOMAIN_WEIGHTS).is_file():
        rounds = read_json(folder / _DOMAIN_WEIGHTS).get("rounds", [])
        lms |= {Path(each[kind]) for each in rounds for kind in ("reference", "proxy")}
    runs = {lm.parent for lm in lms if (lm.parent / "summary.json").is_file()}  # others were given
    trained = sum(float(read_json(run / "summary.json")["train_seconds"]) for run in runs - set(apart))
    return float(record["seconds"]) - float(record.get("proxy_seconds", 0.0)) + trained
