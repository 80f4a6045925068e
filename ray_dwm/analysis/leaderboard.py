"""The leaderboard of an experiment: a row a method, every comparison that was declared, and the verdict in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

from ray_dwm.analysis.comparison import SIGNIFICANT, Comparison, Reached, compare, corrected
from ray_dwm.analysis.grid import NOT_BEGUN, Grid, Outcome
from ray_dwm.analysis.statistics import Interval, Paired, interval
from ray_dwm.config.experiment import Cell

Kind = Literal["baseline", "null", "method"]
TIMES = ("seconds/", "bilevel_seconds/", "step_seconds/", "checkpoint_seconds", "tokens_per_s", "tflops", "mfu")
TIMES += ("time_s", "dwm/overhead_frac")
"""What the clock decides of a line of metrics.jsonl, by the beginnings of its names."""


@dataclass(frozen=True, slots=True)
class Row:
    """A method at a size: means over its finished seeds."""

    size: str
    method: str
    label: str
    kind: Kind
    seeds: tuple[int, ...]
    failed: int
    """Cells that are not done because they have failed."""
    losses: dict[str, Interval]
    """Evaluation set -> loss over all of it; without sets that are others than the baseline's of that name."""
    needed_s: float
    selecting_s: float
    training_s: float
    overhead: float
    versus: Comparison | None
    """Against the baseline."""


@dataclass(frozen=True, slots=True)
class Board:
    """All that the leaderboard says."""

    sets: tuple[str, ...]
    """Evaluation sets, the one that decides first."""
    rows: tuple[Row, ...]
    pairs: tuple[Comparison, ...]
    """Those that methods declare (`against`)."""
    verdict: tuple[str, ...]
    notes: tuple[str, ...]


def build_board(grid: Grid) -> Board:
    """Rows, comparisons and words, of the cells that are done."""
    experiment = grid.experiment
    found = [
        (size, method)
        for size in experiment.sizes
        for method in experiment.methods
        if any(cell.size == size and cell.method == method for cell in grid.cells)
    ]
    versus = _versus_baseline(grid, found)
    rows = [_row(grid, size, method, versus.get((size, method))) for size, method in found]
    pairs = [
        comparison
        for size, method in found
        for other in experiment.methods[method].against
        if (comparison := compare(grid, size, method, other)) is not None
    ]
    pairs = [one for size in experiment.sizes for one in corrected([pair for pair in pairs if pair.size == size])]
    done = [row for row in rows if row.seeds]
    names = sorted({name for row in done for name in row.losses}, key=lambda name: (name != experiment.measure, name))
    verdict = [*_on_rows(grid, done), *_on_pairs(grid, pairs), *_on_repeats(grid)]
    return Board(tuple(names), tuple(rows), tuple(pairs), tuple(verdict), tuple(_notes(grid, rows)))


def _versus_baseline(grid: Grid, found: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Comparison]:
    """p values are corrected over a size's methods; null controls are no candidates, and stand for themselves."""
    experiment, result = grid.experiment, {}
    for size in experiment.sizes:
        methods = [method for s, method in found if s == size and method != experiment.baseline]
        of_all = [c for method in methods if (c := compare(grid, size, method, experiment.baseline)) is not None]
        nulls = [c for c in of_all if experiment.methods[c.method].is_null]
        for one in [*corrected([c for c in of_all if c not in nulls]), *(corrected([c])[0] for c in nulls)]:
            result[size, one.method] = one
    return result


def _row(grid: Grid, size: str, method: str, versus: Comparison | None) -> Row:
    experiment, outcomes = grid.experiment, grid.of(size, method)
    kind: Kind = "baseline" if method == experiment.baseline else "method"
    done = list(outcomes.values())
    return Row(
        size=size,
        method=method,
        label=experiment.label(method),
        kind="null" if experiment.methods[method].is_null else kind,
        seeds=tuple(outcomes),
        failed=sum((c.size, c.method) == (size, method) and grid.state(c).startswith("failed") for c in grid.cells),
        losses={name: interval([one.finals[name] for one in done]) for name in comparable(grid, size, done)},
        needed_s=_mean([one.needed_s for one in done]),
        selecting_s=_mean([one.selecting_s for one in done]),
        training_s=_mean([one.training_s for one in done]),
        overhead=_mean([one.overhead for one in done]),
        versus=versus,
    )


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else 0.0


def comparable(grid: Grid, size: str, done: Sequence[Outcome]) -> list[str]:
    """Sets that all of them have, and that are the baseline's (or, until it is done, the first cell's) of that name."""
    baseline, of_size = grid.experiment.baseline, {c: o for c, o in grid.outcomes.items() if c.size == size}
    model = next((o for cell, o in of_size.items() if cell.method == baseline), next(iter(of_size.values()), None))
    if model is None or not done:
        return []
    shared = set.intersection(*({n for n in o.finals if o.digests.get(n) == model.digests.get(n)} for o in done))
    return [name for name in model.finals if name in shared]


def decided(difference: Paired, p: float | None) -> str:
    """better, worse, or what keeps one from saying so."""
    if p is None:
        return "one seed, no interval"
    if not difference.interval.excludes(0.0):
        return "no difference shown"
    if p >= SIGNIFICANT:
        return "not shown after correction for many comparisons"
    return "better" if difference.interval.mean < 0 else "worse"


def signed(found: Interval) -> str:
    """A difference with its 95 % interval."""
    text = f"{found.mean:+.4f}"
    return text if found.low is None or found.high is None else f"{text} ({found.low:+.4f} to {found.high:+.4f})"


def share(found: Reached) -> str:
    """A part of what the other took, in per cent, with its 95 % interval."""
    if found.share is None:
        return "never" if not found.reached else f"in {found.reached} of {found.of} seeds"
    part = found.share
    text = f"{part.mean:.0%}"
    return text if part.low is None or part.high is None else f"{text} ({part.low:.0%} to {part.high:.0%})"


def _place(grid: Grid, size: str) -> str:
    return f"{size}: " if len(grid.experiment.sizes) > 1 else ""


def _on_rows(grid: Grid, rows: Sequence[Row]) -> list[str]:
    baseline = grid.experiment.label(grid.experiment.baseline)
    lines = []
    for row in rows:
        if row.versus is None:
            continue
        where, gap = _place(grid, row.size), signed(row.versus.at_tokens.interval)
        if row.kind == "null":
            lines.append(f"{where}null control {row.label}: {_on_null(row.versus)} {baseline}, {gap}")
        elif grid.experiment.baseline not in grid.experiment.methods[row.method].against:
            lines.append(f"{where}{row.label} against {baseline}: {_told(grid, row.versus)}")
    return lines


def _on_null(versus: Comparison) -> str:
    found = versus.at_tokens.interval
    if found.low is None:
        return "one seed, no interval to tell it from"
    return "DIFFERS from" if found.excludes(0.0) else "not told apart from"


def _told(grid: Grid, one: Comparison) -> str:
    at_wall = "beside other runs" if shared_machine(grid) else decided(one.at_wall, one.p_wall)
    return (
        f"{decided(one.at_tokens, one.p_tokens)} at equal tokens, {signed(one.at_tokens.interval)}; "
        f"{at_wall} at equal wall-clock, {signed(one.at_wall.interval)}; "
        f"{_arrival(one)}{_without(grid, one)}"
    )


def shared_machine(grid: Grid) -> bool:
    """Whether cells ran at the same time, so that wall-clock is also who ran beside whom."""
    return any(record.get("at_once", 1) > 1 for record in grid.records.values())


def _without(grid: Grid, one: Comparison) -> str:
    cells = [Cell(one.size, method, seed) for method in (one.method, one.other) for seed in grid.experiment.seeds]
    failed = [cell for cell in cells if cell in grid.cells and grid.state(cell).startswith("failed")]
    return f"; WITHOUT what failed: {', '.join(cell.path for cell in failed)}" if failed else ""


def _arrival(one: Comparison) -> str:
    if one.tokens.share is None or one.wall.share is None:
        return f"its last loss {share(one.tokens)}"
    return f"its last loss after {share(one.tokens)} of its tokens and {share(one.wall)} of its wall-clock"


def _on_pairs(grid: Grid, pairs: Sequence[Comparison]) -> list[str]:
    label = grid.experiment.label
    return [f"{_place(grid, p.size)}{label(p.method)} against {label(p.other)}: {_told(grid, p)}" for p in pairs]


def _on_repeats(grid: Grid) -> list[str]:
    lines = []
    for cell, outcome in grid.outcomes.items():
        first = grid.outcomes.get(Cell(cell.size, cell.method, cell.seed))
        if cell.again and first is not None:
            said = difference(first, outcome)
            lines.append(f"two runs of {first.cell.path}: {f'DIFFERENT, {said}' if said else 'identical'}")
    return lines


def difference(one: Outcome, other: Outcome) -> str:
    """Where two runs first differ in losses or any metric but times; empty where they do nowhere, to the last bit."""
    if one.finals != other.finals:
        return "in final losses"
    for a, b in zip(one.run.metrics, other.run.metrics, strict=False):
        left, right = _without_times(a), _without_times(b)
        if left != right:
            return f"at step {a['step']:g}"
    return "" if len(one.run.metrics) == len(other.run.metrics) else "in their number of steps"


def _without_times(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if not key.startswith(TIMES)}


def _notes(grid: Grid, rows: Sequence[Row]) -> list[str]:
    notes = []
    most = max((len(row.seeds) for row in rows), default=0)
    if most == 1:
        notes.append("One seed: there are no intervals and no tests, and no difference is a finding. Add seeds.")
    elif 2 <= most <= 5:
        least = 2 / 2**most
        notes.append(f"{most} seeds: the exact sign-flip test, which assumes least, cannot give a p below {least:.3g}.")
    if shared_machine(grid):
        notes.append(
            "Cells ran beside others (--parallel): wall-clock is also who ran beside whom, and decides nothing here. "
            "overhead is measured within a run."
        )
    commits = {str(record["versions"].get("commit", "")) for record in grid.records.values() if "versions" in record}
    if len(commits) > 1:
        notes.append(f"Cells ran with different code: {', '.join(sorted(commits))}.")
    devices = sorted({device for record in grid.records.values() for device in record.get("devices", [])})
    if len(devices) > 1:
        notes.append(f"Cells ran on different devices ({'; '.join(devices)}): wall-clock does not compare.")
    for size in grid.experiment.sizes:
        budgets = {outcome.tokens for cell, outcome in grid.outcomes.items() if cell.size == size}
        if len(budgets) > 1:
            notes.append(f"{size}: cells of {len(budgets)} budgets, of which only the same are compared.")
    states = {cell: grid.state(cell) for cell in grid.cells}
    notes += [f"{cell.path}: {state}." for cell, state in states.items() if state not in ("done", NOT_BEGUN)]
    if (waiting := sum(state == NOT_BEGUN for state in states.values())) > 0:
        notes.append(f"{waiting} of {len(states)} cells: {NOT_BEGUN}.")
    return notes
