"""Colour and dashes of a figure's lines: no two lines have both in common, however many there are."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from ray_dwm.analysis.theme import INK, NEUTRAL, PALETTE
from ray_dwm.config.experiment import ExperimentConfig


class LineStyle(NamedTuple):
    """How a line is drawn."""

    colour: str
    dashes: Any
    """As matplotlib has them."""


def dashes(turn: int) -> Any:
    """How lines of one colour are told apart: solid, dashed, then one dot more each time between two dashes."""
    return "-" if turn == 0 else (0, (4, 1.5, *(1, 1.5) * (turn - 1)))


def line_styles(count: int) -> list[LineStyle]:
    """Of lines that have nothing to do with one another."""
    return [LineStyle(PALETTE[n % len(PALETTE)], dashes(n // len(PALETTE))) for n in range(count)]


def run_styles(weighted: Sequence[bool]) -> list[LineStyle]:
    """Of runs: grey for uniform weights, and a colour for each of the others."""
    colours = iter(line_styles(len(weighted)))
    greys = (LineStyle(NEUTRAL, dashes(turn)) for turn in itertools.count())
    return [next(colours if each else greys) for each in weighted]


def method_styles(experiment: ExperimentConfig) -> dict[str, LineStyle]:
    """Of methods: what is against another has its colour, dashed, and comes after it; null controls are dotted."""
    nulls = [name for name, method in experiment.methods.items() if method.is_null]
    alone_of = _alone_of(experiment, nulls)
    added_to = {alone: name for name, alone in alone_of.items()}
    palette = ((colour, turn) for turn in itertools.count(0, 2) for colour in PALETTE)
    found: dict[str, LineStyle] = {}
    for name in experiment.methods:
        if name in alone_of or name in nulls:
            continue
        colour, turn = (INK, 0) if name == experiment.baseline else next(palette)
        found[name] = LineStyle(colour, dashes(turn))
        if name in added_to:
            found[added_to[name]] = LineStyle(colour, dashes(turn + 1))
    dots = {name: LineStyle(NEUTRAL, (0, (1, gap))) for gap, name in enumerate(nulls, start=1)}
    return found | dots


def _alone_of(experiment: ExperimentConfig, nulls: Sequence[str]) -> dict[str, str]:
    """Method -> the one that it is against before all others, where it is the first that is, and not in a chain."""
    found: dict[str, str] = {}
    for name, method in experiment.methods.items():
        alone = next(iter(method.against), "")
        taken = {*found, *found.values(), *nulls}
        if alone and name != experiment.baseline and not {name, alone} & taken:
            found[name] = alone
    return found
