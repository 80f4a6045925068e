"""leaderboard.md, leaderboard.json and leaderboard.html in an experiment's folder, from what its cells have left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray_dwm.analysis.cautions import grouped, of_grid
from ray_dwm.analysis.comparison import Comparison
from ray_dwm.analysis.experiment_page import Cautions, sections
from ray_dwm.analysis.grid import Grid, Outcome, read_grid
from ray_dwm.analysis.leaderboard import Board, Row, build_board, share, signed
from ray_dwm.analysis.overlaps import unchecked
from ray_dwm.analysis.render import render
from ray_dwm.analysis.runs import versions
from ray_dwm.analysis.settings import changed
from ray_dwm.analysis.statistics import Interval
from ray_dwm.analysis.tables import Table, markdown
from ray_dwm.data.records import write_whole

LEADERBOARD = "leaderboard"
_COMPARED = ("at equal tokens", "p", "tokens", "at equal wall-clock", "p", "wall-clock")
_COST = ("needed, s", "selecting, s", "training, s", "overhead")


def write_leaderboard(folder: Path) -> Board:
    """Write all three; returns what they say.

    Raises:
        UserError: the folder is no experiment's, or a run folder in it is damaged.
    """
    grid = read_grid(folder)
    board = build_board(grid)
    shown, warned = tables(grid, board), of_grid(grid)
    write_whole(folder / f"{LEADERBOARD}.md", _markdown(grid, board, shown, warned))
    write_whole(folder / f"{LEADERBOARD}.json", json.dumps(content(grid, board, warned), indent=2) + "\n")
    told = {
        "name": grid.experiment.name,
        "budget": _budget(grid),
        "tables": shown,
        "legend": legend(grid),
        "verdict": board.verdict,
        "notes": board.notes,
    }
    page = render("experiment.html", {**told, **sections(grid, board.sets, warned)})
    write_whole(folder / f"{LEADERBOARD}.html", page)
    return board


def tables(grid: Grid, board: Board) -> list[Table]:
    """A leaderboard for each size, best first, of what has been run, and one table of the other comparisons."""
    label, several = grid.experiment.label, len(grid.experiment.sizes) > 1
    result = []
    for size in grid.experiment.sizes:
        rows = [row for row in board.rows if row.size == size and (row.seeds or row.failed)]
        rows.sort(key=lambda row: row.losses[grid.experiment.measure].mean if row.losses else float("inf"))
        header = ("method", "seeds", *(f"loss, {name}" for name in board.sets), *_COMPARED, *_COST)
        lines = tuple(_line(row, board.sets) for row in rows)
        result.append(Table(size if several else "Leaderboard", header, lines, 1))
    if board.pairs:
        header = (*(("size",) if several else ()), "method", "against", "seeds", *_COMPARED)
        lines = tuple(
            (*((p.size,) if several else ()), label(p.method), label(p.other), str(len(p.seeds)), *_compared(p))
            for p in board.pairs
        )
        result.append(Table("Against one another", header, lines, 3 if several else 2))
    return result


def _line(row: Row, sets: Sequence[str]) -> tuple[str, ...]:
    name = f"{row.label} ({row.kind})" if row.kind != "method" else row.label
    seeds = str(len(row.seeds)) + (f", {row.failed} failed" if row.failed else "")
    if not row.seeds:
        return (name, seeds, *[""] * (len(sets) + len(_COMPARED) + len(_COST)))
    losses = [_spread(row.losses[name]) if name in row.losses else "another set" for name in sets]
    compared = _compared(row.versus) if row.versus else [""] * len(_COMPARED)
    cost = [f"{row.needed_s:.0f}", f"{row.selecting_s:.0f}", f"{row.training_s:.0f}", f"{row.overhead:.1%}"]
    return (name, seeds, *losses, *compared, *cost)


def _compared(one: Comparison) -> list[str]:
    at_tokens, at_wall = signed(one.at_tokens.interval), signed(one.at_wall.interval)
    return [at_tokens, _p(one.p_tokens), share(one.tokens), at_wall, _p(one.p_wall), share(one.wall)]


def _spread(found: Interval) -> str:
    return f"{found.mean:.4f}" + (f" ± {found.half:.4f}" if found.half is not None else "")


def _p(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value >= 0.001 else "< 0.001"


def legend(grid: Grid) -> str:
    """What the columns mean."""
    experiment = grid.experiment
    seeds = ", ".join(map(str, sorted({cell.seed for cell in grid.outcomes})))
    return (
        f"Losses in nats per token over whole sets, mean ± half of the 95 % interval over seeds {seeds}; "
        f"{experiment.measure} decides. At equal tokens, at equal wall-clock: its loss minus that of the one it is "
        f"compared with (in the leaderboard {experiment.label(experiment.baseline)}), within seeds, with 95 % interval "
        "and p of the paired t test, corrected by Holm for the methods of a table. Tokens, wall-clock: what it took to "
        "get to the other's last loss, as a part of what the other took. Wall-clock is training, selecting with its "
        "proxy LMs, and the runs that were needed."
    )


def _markdown(grid: Grid, board: Board, shown: Sequence[Table], warned: Cautions) -> str:
    parts = [f"# Experiment {grid.experiment.name}", _budget(grid)]
    for table in shown:
        parts += [f"## {table.title}", markdown(table)]
    parts += [legend(grid), "## Verdict", "\n".join(f"- {line}" for line in board.verdict) or "Nothing is done yet."]
    missing = ", ".join(_unchecked(grid))
    if warned or missing:
        lines = [
            f"- {group.title} ({'; '.join(whose)}): {found} ({group.rule})"
            for group in grouped(warned)
            for found, whose in group.found.items()
        ]
        parts += ["## Warnings", "\n".join([*lines, *([f"- Not looked for: {missing}."] if missing else [])])]
    if board.notes:
        parts += ["## Notes", "\n".join(f"- {line}" for line in board.notes)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _unchecked(grid: Grid) -> list[str]:
    return unchecked([outcome.run for outcome in grid.outcomes.values()])


def _budget(grid: Grid) -> str:
    sizes = {cell.size: outcome for cell, outcome in grid.outcomes.items()}
    told = [f"{o.tokens / 1e6:,.2f} M tokens a run (LM {o.run.config.lm.preset})" for o in sizes.values()]
    return "; ".join(f"{size}: {text}" for size, text in zip(sizes, told, strict=True)) + "." if told else ""


def content(grid: Grid, board: Board, warned: Cautions) -> dict[str, Any]:
    """What leaderboard.json holds: figures of all cells too, and how each method was configured; no folders' names."""
    experiment = grid.experiment
    return {
        "experiment": {key: value for key, value in asdict(experiment).items() if key != "storage"},
        "measure": experiment.measure,
        "versions": versions(),
        "devices": sorted({device for record in grid.records.values() for device in record.get("devices", [])}),
        "rows": [asdict(row) for row in board.rows],
        "pairs": [asdict(pair) for pair in board.pairs],
        "verdict": board.verdict,
        "warnings": [{"of": whose, **asdict(one)} for whose, one in warned],
        "unchecked": _unchecked(grid),
        "notes": board.notes,
        "configurations": {
            f"{cell.size}/{cell.method}": changed(outcome.run.config, places=False)
            for cell, outcome in grid.outcomes.items()
        },
        "cells": {
            cell.path: {"state": grid.state(cell), **(_figures(grid.outcomes[cell]) if cell in grid.outcomes else {})}
            | {key: grid.records.get(cell, {}).get(key) for key in ("needs", "devices", "versions", "at_once")}
            for cell in grid.cells
        },
    }


def _figures(outcome: Outcome) -> dict[str, Any]:
    return {
        "tokens": outcome.tokens,
        "workers": outcome.run.summary["workers"],
        "losses": outcome.finals,
        "sets": outcome.digests,
        "needed_s": outcome.needed_s,
        "selecting_s": outcome.selecting_s,
        "training_s": outcome.training_s,
        "overhead": outcome.overhead,
        "curves": {name: asdict(outcome.curve(name)) for name in outcome.finals},
    }
