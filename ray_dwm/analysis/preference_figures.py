"""Figures of what a weighting preferred, from the numbers of preferences.json, as SVG text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.colors import LinearSegmentedColormap

from ray_dwm.analysis.features import FEATURES
from ray_dwm.analysis.figures import WIDTH, figure
from ray_dwm.analysis.theme import AXIS, FIXED_INK, INK, NEUTRAL

_MOST_GROUPS = 12
_OVER_TIME = LinearSegmentedColormap.from_list("phases", ["#e0a030", "#d4557f", "#5b6ee0"])
_SHADES = LinearSegmentedColormap.from_list("stability", ["#e0672f", "#ffffff", "#2f6fde"])

Table = Mapping[str, Mapping[str, Mapping[str, Any]]]
"""Name -> phase -> estimate."""


def correlations(numbers: Mapping[str, Any]) -> str:
    """Rank correlations of weights with features by phase, with intervals: in the batch, and within domains."""
    features = [feature for feature in FEATURES if feature.name in numbers["features"]]
    breaks = [k for k, f in enumerate(features[1:], start=1) if f.family != features[k - 1].family]
    with figure(9.6, 0.42 * len(features) + 1.1, ncols=2, sharey=True, sharex=True) as (drawn, panels, out):
        for axes, key, title in zip(
            panels,
            ("features", "features_within_domains"),
            ("among all sequences of a batch", "within domains"),
            strict=True,
        ):
            _dots(axes, numbers[key], [f.name for f in features])
            axes.axvline(0.0, color=INK, linewidth=0.8, linestyle=":")
            for place in breaks:
                axes.axhline(place - 0.5, color=AXIS, linewidth=0.8)
            axes.set_title(title, fontsize=10, color=INK)
            axes.set_xlabel("Spearman's correlation with the weight")
        for family in dict.fromkeys(f.family for f in features):
            places = [k for k, f in enumerate(features) if f.family == family]
            middle, options = sum(places) / len(places), {"color": NEUTRAL, "fontsize": 9}
            panels[1].text(1.01, middle, family, transform=panels[1].get_yaxis_transform(), va="center", **options)
        panels[0].set_yticks(range(len(features)), [f.title for f in features])
        panels[0].invert_yaxis()
        handles, labels = panels[0].get_legend_handles_labels()
        drawn.legend(handles, labels, frameon=False, loc="outside upper center", ncols=min(len(labels), 8))
    return out[0]


def group_weights(table: Table) -> str:
    """Mean weight of domains or sources by phase, with intervals; of many those that are farthest from uniform."""
    known = {name: [e["value"] for e in of.values() if e["value"] is not None] for name, of in table.items()}
    known = {name: values for name, values in known.items() if values}
    shown = sorted(known, key=lambda name: -max(abs(value - 1) for value in known[name]))[:_MOST_GROUPS]
    shown.sort(key=lambda name: -sum(known[name]) / len(known[name]))
    with figure(WIDTH, 0.34 * len(shown) + 1.1) as (drawn, axes, out):
        _dots(axes, table, shown)
        axes.axvline(1.0, color=INK, linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(shown)), shown)
        axes.invert_yaxis()
        axes.set_xlabel("mean relative weight (1 = uniform)")
        drawn.legend(frameon=False, loc="outside upper center", ncols=3)
    return out[0]


def _dots(axes: Any, table: Table, names: list[str]) -> None:
    """A dot for each name and phase with the bar of its interval; names from the top, phases beside each other."""
    phases = list(table[names[0]])
    for number, phase in enumerate(phases):
        share = number / max(1, len(phases) - 1)
        colour, offset = _OVER_TIME(share), 0.5 * (share - 0.5)
        found = [(place + offset, table[name][phase]) for place, name in enumerate(names)]
        dots = [(e["value"], y) for y, e in found if e["value"] is not None]
        bars = [(y, e["low"], e["high"]) for y, e in found if e["low"] is not None]
        axes.hlines(*zip(*bars, strict=True), color=colour, linewidth=1.6) if bars else None
        axes.plot(*zip(*dots, strict=True), "o", color=colour, markersize=4.5, label=phase)
    axes.grid(axis="y", visible=False)


def stability(matrix: Mapping[str, Any], phases: list[str]) -> str:
    """Rank correlations between phases as a coloured table."""
    values = [[float("nan") if x is None else x for x in row] for row in matrix["value"]]
    with figure(WIDTH, min(WIDTH, 0.7 * len(phases) + 1.4)) as (_, axes, out):
        axes.imshow(values, cmap=_SHADES, vmin=-1, vmax=1)
        for row, of_row in enumerate(matrix["value"]):
            for column, value in enumerate(of_row):
                text = "" if value is None else f"{value:.2f}"
                light = value is not None and abs(value) > 0.7
                axes.text(
                    column, row, text, ha="center", va="center", color="#ffffff" if light else FIXED_INK, fontsize=9
                )
        axes.set_xticks(range(len(phases)), phases)
        axes.set_yticks(range(len(phases)), phases)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
    return out[0]
