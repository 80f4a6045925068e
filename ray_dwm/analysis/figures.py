"""Figures of the report as SVG text."""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from ray_dwm.analysis.line_styles import LineStyle, line_styles, run_styles
from ray_dwm.analysis.runs import Run
from ray_dwm.analysis.statistics import Interval
from ray_dwm.analysis.theme import ACCENT, AXIS, INK, NEUTRAL, STYLE, themed
from ray_dwm.evaluation.scores import Evaluation, Score

WIDTH, HEIGHT = 4.6, 2.9
"""Inches. Half of a page; on a phone all of it, where text must stay large enough to be read."""
_WIDE = 6.0
"""Inches from which on a phone scrolls rather than shrinks a figure."""
_ROW = 0.2
"""Inches of a line of a legend."""
_SHORT = 20
"""Characters of a label, two of which have room beside each other in a legend."""
_CROWDED = 10
"""Lines; more of them need a taller picture, and paler bands, which lie over one another."""
_FAR_APART = 5.0
"""As many times the time of the quickest line, from which on time has a logarithmic axis."""
_PHASES = {
    "step": NEUTRAL,
    "data": AXIS,
    "bilevel": ACCENT,
    "weigh": "#2a9d74",
    "dwm_wait": "#8759c9",
    "log": "#b8860b",
}
LOSS = "loss, nats per token"
TOKENS, SECONDS, WALL = "million tokens", "seconds of training", "seconds, with what was done before training"


@contextmanager
def figure(width: float = WIDTH, height: float = HEIGHT, **panels: Any) -> Iterator[tuple[Figure, Any, list[str]]]:
    """A figure, or several panels as `plt.subplots` has them, whose SVG text is in the list when the body is done."""
    out: list[str] = []
    with plt.rc_context(STYLE):
        drawn, axes = plt.subplots(figsize=(width, height), layout="constrained", **panels)
        yield drawn, axes, out
        stream = io.StringIO()
        drawn.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
        plt.close(drawn)
        svg = themed(_own_ids(stream.getvalue()[stream.getvalue().index("<svg") :]))
        out.append(svg.replace("<svg ", '<svg class="wide" ', 1) if width > _WIDE else svg)


def _own_ids(svg: str) -> str:
    """Several figures share a page: each keeps its ids, and the references to them, to itself."""
    prefix = hashlib.sha256(svg.encode()).hexdigest()[:8]
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)


def _styles(runs: Sequence[Run]) -> list[LineStyle]:
    return run_styles([run.weighted for run in runs])


def losses(runs: list[Run], key: str, over: str) -> str:
    """A loss of all runs against tokens or wall-clock."""
    scale, shown = 1e6 if over == "tokens" else 1.0, []
    with figure() as (_, axes, out):
        for run, (colour, dashes) in zip(runs, _styles(runs), strict=True):
            x, y = run.series(key, over)
            if not x:
                continue  # this run has no such set
            shown.append((np.array(x[1:]) / scale, y[1:]))
            axes.plot(*shown[-1], color=colour, linestyle=dashes, marker="o", markersize=3, label=run.name)
        _without_the_first(axes, shown)
        axes.set_xlabel(TOKENS if over == "tokens" else SECONDS)
        axes.set_ylabel(LOSS)
        axes.legend(frameon=False)
    return out[0]


def scores(lines: Sequence[tuple[Run, Sequence[tuple[Evaluation, Score]]]], metric: str) -> str:
    """A task's scores of all runs against tokens, with one standard error to both sides."""
    with figure() as (_, axes, out):
        for (run, points), (colour, dashes) in zip(lines, _styles([run for run, _ in lines]), strict=True):
            x = [(evaluation.tokens or 0) / 1e6 for evaluation, _ in points]
            errors = [score.error or 0.0 for _, score in points]
            style: dict[str, Any] = {"color": colour, "linestyle": dashes, "marker": "o", "markersize": 3, "capsize": 2}
            axes.errorbar(x, [score.value for _, score in points], errors, label=run.name, **style)
        axes.set_xlabel(TOKENS)
        axes.set_ylabel(metric)
        axes.legend(frameon=False)
    return out[0]


def _without_the_first(axes: Any, series: Sequence[tuple[Sequence[float], Sequence[float]]]) -> None:
    """Let the first quarter of each curve leave the picture at the top: its fall would hide every difference."""
    later = [b for x, y in series for a, b in zip(x, y, strict=True) if a >= x[0] + (x[-1] - x[0]) / 4]
    if not later:
        return
    margin = 0.06 * (max(later) - min(later)) or 0.01
    axes.set_ylim(min(later) - margin, max(later) + margin)


@dataclass(frozen=True, slots=True)
class Line:
    """A method's loss, or another measure, over training, of several seeds."""

    label: str
    style: LineStyle
    x: list[float]
    y: list[Interval]


def curves(lines: list[Line], over: str, measure: str = LOSS) -> str:
    """Means over seeds with 95 % intervals against `tokens` or `seconds`."""
    scale = 1e6 if over == "tokens" else 1.0
    columns = 1 if any(len(line.label) > _SHORT for line in lines) else 2
    crowd = max(1.0, len(lines) / _CROWDED)
    height = HEIGHT * min(crowd, 1.5) + _ROW * math.ceil(len(lines) / columns)
    with figure(height=height) as (drawn, axes, out):
        for line in lines:
            colour, dashes = line.style
            x = np.array(line.x) / scale
            axes.plot(x, [y.mean for y in line.y], color=colour, linestyle=dashes, linewidth=1.8, label=line.label)
            bounds = [(y.low, y.high) for y in line.y if y.low is not None and y.high is not None]
            if len(bounds) == len(x):
                low, high = np.array(bounds).T
                axes.fill_between(x, low, high, color=colour, alpha=0.15 / crowd, linewidth=0)
        if measure == LOSS:
            _without_the_first(axes, [(np.array(line.x) / scale, [y.mean for y in line.y]) for line in lines])
        axes.set_xlabel(TOKENS if over == "tokens" else WALL)
        axes.set_ylabel(measure)
        if over != "tokens":
            _log_where_far_apart(axes, lines)
        drawn.legend(frameon=False, loc="outside lower center", ncols=columns, handlelength=3.2)  # to show dashes
    return out[0]


def _log_where_far_apart(axes: Any, lines: Sequence[Line]) -> None:
    """One method that needs many times another's time would leave that one no room on a linear axis."""
    ends = [line.x[-1] for line in lines]
    if not ends or max(ends) <= _FAR_APART * min(ends) or min(line.x[0] for line in lines) <= 0:
        return
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _smooth(values: list[float], width: int) -> np.ndarray:
    kernel = np.ones(width) / width
    padded = np.concatenate([np.full(width - 1, values[0]), np.array(values)])
    return np.convolve(padded, kernel, mode="valid")


def domain_weights(run: Run) -> str:
    """Mean relative weight of every domain over training, smoothed over steps."""
    keys = run.keys("weight/")
    with figure(height=HEIGHT + _ROW * math.ceil(len(keys) / 3)) as (drawn, axes, out):
        for key, (colour, dashes) in zip(keys, line_styles(len(keys)), strict=True):
            x, y = run.series(key)
            style: dict[str, Any] = {"color": colour, "linestyle": dashes, "linewidth": 1.8}
            smooth = _smooth(y, max(1, len(y) // 25))
            axes.plot(np.array(x) / 1e6, smooth, label=key.removeprefix("weight/"), **style)
        axes.axhline(1.0, color=INK, linewidth=0.8, linestyle=":")
        axes.set_xlabel(TOKENS)
        axes.set_ylabel("mean weight (1 = uniform)")
        drawn.legend(frameon=False, loc="outside lower center", ncols=3)
    return out[0]


def effective_size(run: Run) -> str:
    """ESS as a share of the global batch, and the weights' entropy over log B."""
    with figure() as (_, axes, out):
        x, ess = run.series("dwm/ess")
        _, entropy = run.series("dwm/entropy")
        millions = np.array(x) / 1e6
        axes.plot(millions, np.array(ess) / run.config.train.global_batch, color=ACCENT, label="ESS / batch")
        axes.plot(millions, entropy, color="#e0672f", label="entropy / log B")
        axes.set_ylim(0, 1.05)
        axes.set_xlabel(TOKENS)
        axes.legend(frameon=False, loc="lower left")
    return out[0]


def hypergradient(run: Run) -> str:
    """Norm of dJ/dphi over training."""
    with figure() as (_, axes, out):
        x, y = run.series("dwm/hypergrad_norm")
        points = [(a / 1e6, b) for a, b in zip(x, y, strict=True) if b > 0]
        axes.plot([a for a, _ in points], [b for _, b in points], color=ACCENT)
        axes.set_yscale("log")
        axes.set_xlabel(TOKENS)
        axes.set_ylabel("|dJ/dφ|")
    return out[0]


def fidelity(run: Run) -> str:
    """Cosine of the alignments with a better estimator's, wherever it was measured."""
    with figure() as (_, axes, out):
        x, y = run.series("dwm/fidelity")
        axes.plot(np.array(x) / 1e6, y, color=ACCENT, marker="o", markersize=4)
        axes.axhline(1.0, color=INK, linewidth=0.8, linestyle=":")
        axes.set_ylim(min(0.9, *y) - 0.01, 1.005)
        axes.set_xlabel(TOKENS)
        axes.set_ylabel("fidelity (cosine)")
    return out[0]


def predicted_change(run: Run) -> str:
    """Change of the target loss by weights moved along the alignments: as these predict it, and as it was."""
    with figure() as (_, axes, out):
        for key, colour, label in (
            ("bilevel/realised_change", NEUTRAL, "realised"),
            ("bilevel/predicted_change", ACCENT, "predicted"),
        ):
            x, y = run.series(key)
            axes.plot(np.array(x) / 1e6, y, color=colour, marker="o", markersize=4, label=label)
        axes.axhline(0.0, color=INK, linewidth=0.8, linestyle=":")
        axes.set_xlabel(TOKENS)
        axes.set_ylabel("nats per token")
        axes.legend(frameon=False)
    return out[0]


def time_split(seconds: Mapping[str, Mapping[str, float]]) -> str:
    """Where the time of runs or methods went: label -> phase -> seconds, or their mean."""
    with figure(height=0.34 * len(seconds) + 1.4) as (drawn, axes, out):
        places, left = range(len(seconds)), np.zeros(len(seconds))
        for name, colour in _PHASES.items():
            widths = np.array([phases[name] for phases in seconds.values()])
            axes.barh(places, widths, left=left, height=0.6, color=colour, label=name)
            left += widths
        axes.set_yticks(places, list(seconds))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("seconds")
        drawn.legend(frameon=False, ncols=3, loc="outside lower center")
    return out[0]
