"""What leaderboard.html shows of an experiment besides its tables: curves, preferences, cost, data, configuration."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from statistics import fmean, median
from typing import Any

from ray_dwm.analysis import figures
from ray_dwm.analysis.cautions import Caution, grouped
from ray_dwm.analysis.data_card import data_card, records_of_stages
from ray_dwm.analysis.grid import Grid, Outcome
from ray_dwm.analysis.leaderboard import comparable
from ray_dwm.analysis.line_styles import line_styles, method_styles
from ray_dwm.analysis.overlaps import unchecked
from ray_dwm.analysis.results import task_table
from ray_dwm.analysis.runs import versions
from ray_dwm.analysis.settings import settings_table
from ray_dwm.analysis.statistics import interval
from ray_dwm.analysis.tables import Table
from ray_dwm.config import RunConfig, to_yaml
from ray_dwm.data.manifest import find_manifest
from ray_dwm.data.records import read_json
from ray_dwm.selection.record import RECORD

Cautions = Sequence[tuple[str, Caution]]


def sections(grid: Grid, sets: Sequence[str], cautions: Cautions) -> dict[str, Any]:
    """All of them, for the templates.

    Args:
        sets: evaluation sets, the one that decides first.
    """
    sizes = [size for size in grid.experiment.sizes if any(cell.size == size for cell in grid.outcomes)]
    first = next(iter(grid.outcomes.values()), None)
    places = [(size, name) for size in sizes for name in sets]
    return {
        "cautions": grouped(cautions),
        "unchecked": unchecked([outcome.run for outcome in grid.outcomes.values()]),
        "losses": [
            (_place(grid, size, name), *(_losses(grid, size, name, over) for over in ("tokens", "seconds")))
            for size, name in places
        ],
        "tasks": [table for size in sizes if (table := _tasks(grid, size)) is not None],
        "preferences": [
            (_place(grid, size, grid.experiment.label(method)), figure)
            for size in sizes
            for method in grid.experiment.methods
            if (figure := _preferences(grid, size, method)) is not None
        ],
        "health": _health(grid, sizes),
        "times": [(_place(grid, size, "Where the time went"), _times(grid, size)) for size in sizes],
        "cards": [data_card(first.run)] if first else [],
        "selections": [table for size in sizes if (table := _selections(grid, size)) is not None],
        "settings": [_settings(grid, size) for size in sizes],
        "configs": [
            (_place(grid, size, label), to_yaml(config))
            for size in sizes
            for label, config in _configs(grid, size).items()
        ],
        "versions": versions(),
    }


def _place(grid: Grid, size: str, name: str) -> str:
    return f"{size}, {name}" if len(grid.experiment.sizes) > 1 else name


def _losses(grid: Grid, size: str, name: str, over: str) -> str:
    """The methods' mean loss of a set over training with 95 % intervals, without the first point, before training."""
    experiment, lines = grid.experiment, []
    for method, style in method_styles(experiment).items():
        done = [outcome for outcome in grid.of(size, method).values() if name in comparable(grid, size, [outcome])]
        curves = [outcome.curve(name) for outcome in done]
        points = min((len(curve.losses) for curve in curves), default=0)
        if points < 2:
            continue
        xs = [curve.tokens if over == "tokens" else curve.seconds for curve in curves]
        lines.append(
            figures.Line(
                label=experiment.label(method),
                style=style,
                x=[fmean(x[k] for x in xs) for k in range(1, points)],
                y=[interval([curve.losses[k] for curve in curves]) for k in range(1, points)],
            )
        )
    return figures.curves(lines, over)


def _tasks(grid: Grid, size: str) -> Table | None:
    methods = grid.experiment.methods
    runs = {grid.experiment.label(m): [outcome.run for outcome in grid.of(size, m).values()] for m in methods}
    table = task_table({label: of for label, of in runs.items() if of})
    return None if table is None else dataclasses.replace(table, title=_place(grid, size, table.title))


_POINTS = 25
"""Of the curves of domains' weights."""


def _preferences(grid: Grid, size: str, method: str) -> str | None:
    """The mean weight of every domain over training, mean over seeds; None where a method weighs uniformly."""
    runs = [outcome.run for outcome in grid.of(size, method).values() if outcome.run.weighted]
    lines, keys = [], list(dict.fromkeys(key for run in runs for key in run.keys("weight/")))
    for key, style in zip(keys, line_styles(len(keys)), strict=True):
        series = [run.series(key) for run in runs]
        width = max(max(run.summary["tokens"] for run in runs) / _POINTS, 1.0)
        binned = [_binned(x, y, width) for x, y in series]  # a domain is not in every batch
        bins = sorted(set.intersection(*(set(of) for of in binned)))
        if not bins:
            continue
        lines.append(
            figures.Line(
                label=key.removeprefix("weight/"),
                style=style,
                x=[(place + 0.5) * width for place in bins],
                y=[interval([of[place] for of in binned]) for place in bins],
            )
        )
    return figures.curves(lines, "tokens", "mean weight (1 = uniform)") if lines else None


def _binned(x: Sequence[float], y: Sequence[float], width: float) -> dict[int, float]:
    """Mean of the values in each interval of that width, by its number."""
    values: dict[int, list[float]] = {}
    for at, value in zip(x, y, strict=True):
        values.setdefault(math.ceil(at / width) - 1, []).append(value)
    return {place: fmean(of) for place, of in values.items()}


def _health(grid: Grid, sizes: Sequence[str]) -> Table | None:
    """How far the weights can be trusted and what they cost: a row for each method that weighs."""
    rows = []
    for size in sizes:
        for method in grid.experiment.methods:
            done = [o for o in grid.of(size, method).values() if o.run.weighted]
            if done:
                label = _place(grid, size, grid.experiment.label(method))
                rows.append((label, str(len(done)), *_trust(done), _told([o.overhead for o in done], percent=True)))
    header = ("method", "seeds", "fidelity", "change foreseen", "ESS", "lowest ESS", "overhead")
    return Table("Fidelity and overhead", header, tuple(rows), 1) if rows else None


def _trust(done: Sequence[Outcome]) -> tuple[str, str, str, str]:
    fidelities = [median(values) for o in done if (values := o.run.series("dwm/fidelity")[1])]
    signs = [_foreseen(o) for o in done]
    shares = [[e / o.run.config.train.global_batch for e in o.run.series("dwm/ess")[1]] for o in done]
    known = [of for of in shares if of]
    return (
        _told(fidelities),
        _told([sign for sign in signs if sign is not None], percent=True),
        _told([fmean(of) for of in known], percent=True),
        f"{min(min(of) for of in known):.1%}" if known else "",
    )


def _foreseen(outcome: Outcome) -> float | None:
    """In what part of the checks the target loss moved to the side that the alignments predicted."""
    predicted = outcome.run.series("bilevel/predicted_change")[1]
    realised = outcome.run.series("bilevel/realised_change")[1]
    if not predicted or len(predicted) != len(realised):
        return None
    return fmean(float(p * r > 0) for p, r in zip(predicted, realised, strict=True))


def _told(values: Sequence[float], percent: bool = False) -> str:
    """A mean over seeds, with half of its 95 % interval."""
    if not values:
        return ""
    found = interval(values)
    mean, half = (f"{x:.1%}" if percent else f"{x:.3f}" for x in (found.mean, found.half or 0.0))
    return mean if found.half is None else f"{mean} ± {half}"


def _times(grid: Grid, size: str) -> str:
    """Seconds of the phases of training, mean over seeds."""
    split = {}
    for method in grid.experiment.methods:
        seconds = [o.run.summary["seconds"] for o in grid.of(size, method).values()]
        if seconds:
            split[grid.experiment.label(method)] = {name: fmean(of[name] for of in seconds) for name in seconds[0]}
    return figures.time_split(split)


def _selections(grid: Grid, size: str) -> Table | None:
    """The share of every domain in what each method trained on, of its first seed; None where nothing was selected."""
    rows: list[tuple[str, dict[str, float]]] = []
    for method in grid.experiment.methods:
        outcome = next(iter(grid.of(size, method).values()), None)
        for told, record in _records(outcome) if outcome else []:
            if not rows:
                rows.append(("the pool", {name: of["share_pool"] for name, of in record["domains"].items()}))
            shares = {name: of["share_selected"] for name, of in record["domains"].items()}
            rows.append((grid.experiment.label(method) + told, shares))
    if not rows:
        return None
    domains = list(rows[0][1])
    lines = tuple((label, *(f"{shares.get(name, 0.0):.1%}" for name in domains)) for label, shares in rows)
    return Table(_place(grid, size, "Share of each domain after selecting"), ("method", *domains), lines, 1)


def _records(outcome: Outcome) -> list[tuple[str, dict[str, Any]]]:
    """(which, record) of all selections of a run, in order."""
    if outcome.run.config.in_stages:
        return [(f", stage {record['stage']}", record) for record in records_of_stages(outcome.run)]
    manifest = find_manifest(outcome.run.config.data.train)
    path = manifest.folder / RECORD if manifest else None
    return [("", read_json(path))] if path is not None and path.is_file() else []


def _configs(grid: Grid, size: str) -> dict[str, RunConfig]:
    """Of each method's first seed."""
    return {
        grid.experiment.label(method): next(iter(cells.values())).run.config
        for method in grid.experiment.methods
        if (cells := grid.of(size, method))
    }


def _settings(grid: Grid, size: str) -> Table:
    """What differs from the defaults but for places and seeds, in which all cells differ."""
    table = settings_table(_configs(grid, size), places=False)
    return dataclasses.replace(table, title=_place(grid, size, table.title))
