"""Colours of figures: hex values for matplotlib, and in the page variables of style.html, which know light and dark."""

from __future__ import annotations

import re

NEUTRAL, ACCENT, INK, GRID, AXIS = "#8a8f98", "#2f6fde", "#30343b", "#e6e8ec", "#c4c8cf"
PALETTE = [ACCENT, "#e0672f", "#2a9d74", "#c23f6d", "#8759c9", "#b8860b", "#1d9bb0", "#7a5c3e", "#6b7280", "#5a8f29"]
FIXED_INK = "#14171b"
"""Of text on a coloured ground, which is the same in both themes."""
STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": AXIS,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "svg.fonttype": "none",
    "svg.hashsalt": "ray_dwm",
}
_VARIABLES = {NEUTRAL: "neutral", INK: "ink", GRID: "line", AXIS: "axis"} | {
    colour: f"c{index}" for index, colour in enumerate(PALETTE)
}


def themed(svg: str) -> str:
    """An SVG whose known colours are the page's variables; the hex value stays for whoever has none."""
    return re.sub(r"\b(fill|stroke): (#[0-9a-f]{6})\b", _variable, svg)


def _variable(found: re.Match[str]) -> str:
    name = _VARIABLES.get(found[2])
    return f"{found[1]}: var(--{name}, {found[2]})" if name else found[0]
