"""Figures of the report as SVG text."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from ray_dwm.analysis.runs import Run
from ray_dwm.analysis.statistics import Interval
from ray_dwm.evaluation.scores import Evaluation, Score

UNIFORM, DWM, INK, GRID = "#8a8f98", "#2f6fde", "#30343b", "#e6e8ec"
PALETTE = ["#2f6fde", "#e0672f", "#2a9d74", "#c23f6d", "#8759c9", "#b8860b", "#1d9bb0", "#7a5c3e", "#6b7280", "#5a8f29"]
_PHASES = {
    "step": UNIFORM,
    "data": "#c4c8cf",
    "bilevel": DWM,
    "weigh": "#2a9d74",
    "dwm_wait": "#8759c9",
    "log": "#b8860b",
}
_STYLE = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": "#c4c8cf",
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "svg.fonttype": "none",
    "svg.hashsalt": "ray_dwm",
}


@contextmanager
def figure(width: float = 5.6, height: float = 3.2, **panels: Any) -> Iterator[tuple[Figure, Any, list[str]]]:
    """A figure, or several panels as `plt.subplots` has them, whose SVG text is in the list when the body is done."""
    out: list[str] = []
    with plt.rc_context(_STYLE):
        drawn, axes = plt.subplots(figsize=(width, height), layout="constrained", **panels)
        yield drawn, axes, out
        stream = io.StringIO()
        drawn.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
        plt.close(drawn)
        out.append(_own_ids(stream.getvalue()[stream.getvalue().index("<svg") :]))


def _own_ids(svg: str) -> str:
    """Several figures share a page: each keeps its ids, and the references to them, to itself."""
    prefix = hashlib.sha256(svg.encode()).hexdigest()[:8]
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", svg)


def _colour(run: Run) -> str:
    return DWM if run.weighted else UNIFORM


def losses(runs: list[Run], key: str, over: str) -> str:
    """A loss of all runs against tokens or wall-clock."""
    with figure() as (_, axes, out):
        for run in runs:
            x, y = run.series(key, over)
            if not x:
                continue  # this run has no such set
            scale = 1e6 if over == "tokens" else 1.0
            axes.plot(np.array(x[1:]) / scale, y[1:], color=_colour(run), marker="o", markersize=3, label=run.name)
        axes.set_xlabel("million tokens" if over == "tokens" else "seconds of training")
        axes.set_ylabel("loss, nats per token")
        axes.legend(frameon=False)
    return out[0]


def scores(lines: Sequence[tuple[Run, Sequence[tuple[Evaluation, Score]]]], metric: str) -> str:
    """A task's scores of all runs against tokens, with one standard error to both sides."""
    with figure() as (_, axes, out):
        for run, points in lines:
            x = [(evaluation.tokens or 0) / 1e6 for evaluation, _ in points]
            errors = [score.error or 0.0 for _, score in points]
            style: dict[str, Any] = {"color": _colour(run), "marker": "o", "markersize": 3, "capsize": 2}
            axes.errorbar(x, [score.value for _, score in points], errors, label=run.name, **style)
        axes.set_xlabel("million tokens")
        axes.set_ylabel(metric)
        axes.legend(frameon=False)
    return out[0]


@dataclass(frozen=True, slots=True)
class Line:
    """A method's loss over training, of several seeds."""

    label: str
    kind: str
    """baseline, null, or neither."""
    x: list[float]
    y: list[Interval]


def curves(lines: list[Line], over: str) -> str:
    """Mean losses with 95 % intervals against `tokens` or `seconds`."""
    scale = 1e6 if over == "tokens" else 1.0
    with figure(8.6, 3.8) as (_, axes, out):
        for index, line in enumerate(lines):
            plain = {"baseline": (UNIFORM, "-"), "null": (UNIFORM, ":")}
            own = (PALETTE[index % len(PALETTE)], "-" if index < len(PALETTE) else "--")
            colour, style = plain.get(line.kind, own)
            x = np.array(line.x) / scale
            axes.plot(x, [y.mean for y in line.y], color=colour, linestyle=style, linewidth=1.8, label=line.label)
            bounds = [(y.low, y.high) for y in line.y if y.low is not None and y.high is not None]
            if len(bounds) == len(x):
                low, high = np.array(bounds).T
                axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_xlabel("million tokens" if over == "tokens" else "seconds, with what was done before training")
        axes.set_ylabel("loss, nats per token")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return out[0]


def _smooth(values: list[float], width: int) -> np.ndarray:
    kernel = np.ones(width) / width
    padded = np.concatenate([np.full(width - 1, values[0]), np.array(values)])
    return np.convolve(padded, kernel, mode="valid")


def domain_weights(run: Run) -> str:
    """Mean relative weight of every domain over training, smoothed over steps."""
    with figure(8.6, 3.8) as (_, axes, out):
        for index, key in enumerate(run.keys("weight/")):
            x, y = run.series(key)
            name = key.removeprefix("weight/")
            colour = PALETTE[index % len(PALETTE)]
            axes.plot(np.array(x) / 1e6, _smooth(y, max(1, len(y) // 25)), color=colour, label=name, linewidth=1.8)
        axes.axhline(1.0, color=INK, linewidth=0.8, linestyle=":")
        axes.set_xlabel("million tokens")
        axes.set_ylabel("mean relative weight (1 = uniform)")
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return out[0]


def effective_size(run: Run) -> str:
    """ESS as a share of the global batch, and the weights' entropy over log B."""
    with figure() as (_, axes, out):
        x, ess = run.series("dwm/ess")
        _, entropy = run.series("dwm/entropy")
        millions = np.array(x) / 1e6
        axes.plot(millions, np.array(ess) / run.config.train.global_batch, color=DWM, label="ESS / batch")
        axes.plot(millions, entropy, color="#e0672f", label="entropy / log B")
        axes.set_ylim(0, 1.05)
        axes.set_xlabel("million tokens")
        axes.legend(frameon=False, loc="lower left")
    return out[0]


def hypergradient(run: Run) -> str:
    """Norm of dJ/dphi over training."""
    with figure() as (_, axes, out):
        x, y = run.series("dwm/hypergrad_norm")
        points = [(a / 1e6, b) for a, b in zip(x, y, strict=True) if b > 0]
        axes.plot([a for a, _ in points], [b for _, b in points], color=DWM)
        axes.set_yscale("log")
        axes.set_xlabel("million tokens")
        axes.set_ylabel("|dJ/dφ|")
    return out[0]


def fidelity(run: Run) -> str:
    """Cosine of the alignments with a better estimator's, wherever it was measured."""
    with figure() as (_, axes, out):
        x, y = run.series("dwm/fidelity")
        axes.plot(np.array(x) / 1e6, y, color=DWM, marker="o", markersize=4)
        axes.axhline(1.0, color=INK, linewidth=0.8, linestyle=":")
        axes.set_ylim(min(0.9, *y) - 0.01, 1.005)
        axes.set_xlabel("million tokens")
        axes.set_ylabel("fidelity (cosine)")
    return out[0]


def predicted_change(run: Run) -> str:
    """Change of the target loss by weights moved along the alignments: as these predict it, and as it was."""
    with figure() as (_, axes, out):
        for key, colour, label in (
            ("bilevel/realised_change", UNIFORM, "realised"),
            ("bilevel/predicted_change", DWM, "predicted"),
        ):
            x, y = run.series(key)
            axes.plot(np.array(x) / 1e6, y, color=colour, marker="o", markersize=4, label=label)
        axes.axhline(0.0, color=INK, linewidth=0.8, linestyle=":")
        axes.set_xlabel("million tokens")
        axes.set_ylabel("nats per token")
        axes.legend(frameon=False)
    return out[0]


def overhead(run: Run) -> str:
    """Where the weighted run's time went."""
    seconds = run.summary["seconds"]
    with figure(8.6, 1.5) as (_, axes, out):
        left, total = 0.0, sum(seconds.values())
        for name, colour in _PHASES.items():
            axes.barh([0], [seconds[name]], left=[left], color=colour, label=f"{name} {seconds[name] / total:.1%}")
            left += seconds[name]
        axes.set_yticks([])
        axes.grid(visible=False)
        axes.set_xlabel("seconds")
        axes.legend(frameon=False, ncols=6, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return out[0]
