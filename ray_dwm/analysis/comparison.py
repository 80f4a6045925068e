"""One method of an experiment against another, seed by seed: at equal tokens, and at equal wall-clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ray_dwm.analysis.grid import Grid, Outcome
from ray_dwm.analysis.statistics import Interval, Paired, holm, interval, paired, ratio, read_at
from ray_dwm.analysis.verdict import crossing

SIGNIFICANT = 0.05


@dataclass(frozen=True, slots=True)
class Reached:
    """What one method took to get to the other's last loss, as a part of what the other took in all."""

    of: int
    """Seeds."""
    reached: int
    """Those in which it got there at all."""
    share: Interval | None
    """Geometric mean over seeds; None where it did not get there in all of them."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A method minus another, by the loss of the set that decides."""

    size: str
    method: str
    other: str
    seeds: tuple[int, ...]
    at_tokens: Paired
    """Of losses over the whole set, after the same tokens."""
    at_wall: Paired
    """Of losses as they were taken during training, at the time at which the other one ended; a method that had ended
    before keeps its last loss."""
    tokens: Reached
    wall: Reached
    p_tokens: float | None = None
    """Of the paired t test, corrected for how many methods were compared; None where there is no test."""
    p_wall: float | None = None


def compare(grid: Grid, size: str, method: str, other: str) -> Comparison | None:
    """Over the seeds in which both are done, with the same tokens and on the same set; None where there is none."""
    name = grid.experiment.measure
    mine, theirs = grid.of(size, method), grid.of(size, other)
    seeds = [seed for seed in mine if seed in theirs and _alike(mine[seed], theirs[seed], name)]
    if not seeds:
        return None
    pairs = [(mine[seed], theirs[seed]) for seed in seeds]
    return Comparison(
        size=size,
        method=method,
        other=other,
        seeds=tuple(seeds),
        at_tokens=paired([a.finals[name] - b.finals[name] for a, b in pairs]),
        at_wall=paired([_at_wall(a, b, name) for a, b in pairs]),
        tokens=_reached([_tokens_share(a, b, name) for a, b in pairs]),
        wall=_reached([_wall_share(a, b, name) for a, b in pairs]),
    )


def differences(grid: Grid, size: str, method: str, other: str) -> dict[str, Interval]:
    """Evaluation set -> last loss minus the other's, over the seeds in which both have that very set."""
    mine, theirs = grid.of(size, method), grid.of(size, other)
    pairs = [(mine[seed], theirs[seed]) for seed in mine if seed in theirs]
    found: dict[str, Interval] = {}
    for name in dict.fromkeys(name for one, _ in pairs for name in one.finals):
        of_set = [a.finals[name] - b.finals[name] for a, b in pairs if _alike(a, b, name)]
        if of_set:
            found[name] = interval(of_set)
    return found


def corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """With p values corrected for all of them (Holm), those at equal tokens and those at equal wall-clock apart."""
    keys = range(len(comparisons))
    tokens = holm({str(k): p for k in keys if (p := comparisons[k].at_tokens.p_t) is not None})
    wall = holm({str(k): p for k in keys if (p := comparisons[k].at_wall.p_t) is not None})
    return [replace(comparisons[k], p_tokens=tokens.get(str(k)), p_wall=wall.get(str(k))) for k in keys]


def _alike(one: Outcome, other: Outcome, name: str) -> bool:
    measured = name in one.finals and name in other.finals
    return measured and one.tokens == other.tokens and one.digests.get(name) == other.digests.get(name)


def _at_wall(one: Outcome, other: Outcome, name: str) -> float:
    curve, end = one.curve(name), other.curve(name)
    return read_at(curve.seconds, curve.losses, end.seconds[-1]) - end.losses[-1]


def _tokens_share(one: Outcome, other: Outcome, name: str) -> float | None:
    curve, end = one.curve(name), other.curve(name)
    tokens = crossing(curve.tokens, curve.losses, end.losses[-1])
    return None if tokens is None else tokens / end.tokens[-1]


def _wall_share(one: Outcome, other: Outcome, name: str) -> float | None:
    curve, end = one.curve(name), other.curve(name)
    seconds = crossing(curve.seconds, curve.losses, end.losses[-1])
    return None if seconds is None else seconds / end.seconds[-1]


def _reached(shares: Sequence[float | None]) -> Reached:
    known = [share for share in shares if share is not None]
    whole = len(known) == len(shares) and all(share > 0 for share in known)
    return Reached(len(shares), len(known), ratio(known) if whole else None)
