"""What a sweep has found, as plain numbers: its trials, their Pareto front, the best, and whether scales agree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from ray_dwm.analysis.ranks import spearman


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One setting at the first scale."""

    id: str
    """Its folder in the sweep's trials/."""
    control: str = ""
    """`defaults` or `uniform`, which are there to compare with."""
    values: dict[str, Any] = field(default_factory=dict)
    """Dotted key -> what was tried; none for controls that lie outside the space."""
    state: Literal["done", "ended early", "failed", "begun", "waiting"]
    loss: float | None = None
    """Over the whole measured set at the end; of one that was ended early, the last one on its curve."""
    overhead: float | None = None
    """Time of what weighing adds over time of plain training."""
    reason: str = ""
    """Of a failure."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One setting at a later scale."""

    trial: str
    """That of the first scale; `uniform` and `defaults` for the controls."""
    how: Literal["learn", "replay", "frozen", "adapt", "uniform"]
    """Where its weights come from at this scale."""
    loss: float
    """Mean over seeds."""
    overhead: float
    seeds: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Correlation:
    """Whether the settings that are better at one scale are better at the next."""

    scale: str
    following: str
    settings: list[str]
    spearman: float | None
    """None for less than three settings, or where all of a scale are alike."""


def finished(trials: Sequence[Trial]) -> list[Trial]:
    """Those that will not be run again."""
    return [trial for trial in trials if trial.state in ("done", "ended early", "failed")]


def done(trials: Sequence[Trial]) -> list[Trial]:
    """Those that were trained to their end, best first."""
    found = [trial for trial in trials if trial.state == "done" and trial.loss is not None]
    return sorted(found, key=lambda trial: (trial.loss, trial.overhead, trial.id))


def pareto(trials: Sequence[Trial]) -> list[Trial]:
    """Of those that were trained to their end, the ones that no other beats in loss and overhead together.

    One that is equal in both beats nobody; from the lowest loss to the lowest overhead.
    """
    front: list[Trial] = []
    for trial in done(trials):  # losses rise, so only a lower overhead than all before is worth having
        same = front and (front[-1].loss, front[-1].overhead) == (trial.loss, trial.overhead)
        if same or all((trial.overhead or 0.0) < (other.overhead or 0.0) for other in front):
            front.append(trial)
    return front


def best(trials: Sequence[Trial], number: int, max_overhead: float) -> list[Trial]:
    """The searched trials with the lowest loss whose overhead is within the cap (0: any is)."""
    searched = [trial for trial in done(trials) if not trial.control]
    within = [trial for trial in searched if not max_overhead or (trial.overhead or 0.0) <= max_overhead]
    return within[:number]


def agreement(scale: str, before: Mapping[str, float], following: str, after: Mapping[str, float]) -> Correlation:
    """Spearman's correlation of the losses (setting -> loss) that both scales have."""
    both = sorted(before.keys() & after.keys())
    found = math.nan
    if len(both) > 2:
        found = float(spearman(np.array([before[s] for s in both]), np.array([after[s] for s in both])))
    value = None if math.isnan(found) else found
    return Correlation(scale=scale, following=following, settings=both, spearman=value)


def recommended(rows: Sequence[Row], max_overhead: float) -> Row:
    """The row with the lowest loss within the cap; where none is within, uniform weights cost nothing."""
    within = [row for row in rows if not max_overhead or row.overhead <= max_overhead]
    return min(within or rows, key=lambda row: (row.loss, row.overhead, row.trial, row.how))
