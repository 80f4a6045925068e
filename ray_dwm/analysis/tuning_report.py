"""A sweep's report as Markdown and as a page with its parallel coordinates; from the content of report.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape
from matplotlib import colormaps

from ray_dwm.analysis import figures

Content = Mapping[str, Any]
_WORDS = {
    "learn": "learnt here",
    "replay": "the scale before's DWMs, replayed",
    "frozen": "the scale before's last DWM, frozen",
    "adapt": "the scale before's last DWM, adapted",
    "uniform": "uniform weights",
}


def markdown(content: Content) -> str:
    """The whole report but its figure."""
    parts = [f"# Sweep {content['sweep']}", summary(content)]
    for title, head, rows in tables(content):
        lines = [head, ["---"] * len(head), *rows]
        parts += [
            f"## {title}",
            "\n".join(f"| {' | '.join(cell.replace('|', ' ') for cell in line)} |" for line in lines),
        ]
    parts += ["## Notes", "\n".join(f"- {line}" for line in notes(content))]
    return "\n\n".join(parts) + "\n"


def html(content: Content) -> str:
    """The same as a page, with parallel coordinates."""
    environment = Environment(loader=PackageLoader("ray_dwm.analysis", "."), autoescape=select_autoescape())
    return environment.get_template("tuning.html").render(
        name=content["sweep"],
        summary=summary(content),
        tables=tables(content),
        notes=notes(content),
        figure=coordinates(content),
        versions=content["versions"],
    )


def summary(content: Content) -> str:
    """One paragraph: what was searched, and what comes out of it."""
    found = content["recommended"]
    values = ", ".join(f"{key}={_text(value)}" for key, value in found["values"].items())
    space = "; ".join(f"{key}: {text}" for key, text in content["space"].items())
    return (
        f"Recommended at scale {found['scale']}: trial {found['trial']} ({_WORDS[found['how']]}"
        f"{', ' + values if values else ''}), loss {found['loss']:.4f} nats per token on {content['measure']}, "
        f"overhead {found['overhead']:.1%}. Searched by {content['sampler']} with seed {content['seed']}: {space}. "
        f"On {content['device']}."
    )


def tables(content: Content) -> list[tuple[str, list[str], list[list[str]]]]:
    """(title, header, rows) of the trials, the importances and each later scale."""
    keys, front = list(content["space"]), set(content["pareto"])
    rank = {"done": 0, "ended early": 1, "failed": 2}
    trials = [trial for trial in content["trials"] if trial["state"] in rank]
    trials.sort(key=lambda t: (rank[t["state"]], t["loss"] if t["loss"] is not None else math.inf))
    rows = [
        [
            trial["id"],
            *(_text(trial["values"].get(key, "")) for key in keys),
            _figure(trial["loss"], ".4f"),
            _figure(trial["overhead"], ".1%"),
            "yes" if trial["id"] in front else "",
            trial["state"],
        ]
        for trial in trials
    ]
    head = ["trial", *keys, "loss", "overhead", "Pareto front", "state"]
    result = [(f"Trials at scale {content['scales'][0]}", head, rows)]
    if content["importance"]:
        named = list(content["importance"])
        shares = [[key, *(f"{content['importance'][name][key]:.0%}" for name in named)] for key in keys]
        result.append(("Importance (fANOVA)", ["key", *(f"of {name}" for name in named)], shares))
    for stage in content["stages"]:
        lines = [
            [row["trial"], _WORDS[row["how"]], f"{row['loss']:.4f}", f"{row['overhead']:.1%}", str(row["seeds"])]
            for row in stage["rows"]
        ]
        result.append((f"Scale {stage['scale']}", ["trial", "weights", "loss", "overhead", "seeds"], lines))
    return result


def notes(content: Content) -> list[str]:
    """What the tables do not say."""
    lines = []
    for each in content["correlations"]:
        told = "none can be given" if each["spearman"] is None else f"{each['spearman']:.2f}"
        lines.append(
            f"Spearman's rank correlation of losses at {each['scale']} and {each['following']}, over "
            f"{len(each['settings'])} settings ({', '.join(each['settings'])}): {told}."
        )
    if not content["importance"]:
        lines.append("No importances: they need four trials that were trained to their end, and differ.")
    if content["max_overhead"]:
        lines.append(
            f"Settings with an overhead above {content['max_overhead']:.1%} are neither promoted nor recommended."
        )
    for stage in content["stages"]:
        page = f"scale-{stage['scale']}/leaderboard.html"
        lines.append(f"Curves, intervals, warnings and tasks of scale {stage['scale']}: {page}.")
    lines += [f"Trial {t['id']} failed: {t['reason']}" for t in content["trials"] if t["state"] == "failed"]
    lines.append(
        "Losses are over the whole set at the end of training; of a trial that was ended early, over "
        "train.eval_sequences where it ended. What the search cost is not in the overheads."
    )
    return lines


def coordinates(content: Content) -> str:
    """A line for each trial that was trained to its end, over its values, loss and overhead; the best are dark."""
    keys = list(content["space"])
    trials = [t for t in content["trials"] if t["state"] == "done" and t["values"].keys() == content["space"].keys()]
    if not trials:
        return ""
    axes_of = [_axis([t["values"][key] for t in trials], key in content["log"]) for key in keys]
    axes_of += [_axis([t[name] for t in trials], False) for name in ("loss", "overhead")]
    order = np.argsort(np.argsort([t["loss"] for t in trials])) / max(1, len(trials) - 1)
    with figures.figure(1.6 * len(axes_of) + 1.0, 3.6) as (_, axes, out):
        for line in np.argsort(-order):  # the best on top
            heights = [axis[0][line] for axis in axes_of]
            axes.plot(heights, color=colormaps["viridis"](order[line]), linewidth=2.2 - order[line], alpha=0.9)
        for place, (_, ticks) in enumerate(axes_of):
            for height, label in ticks:
                axes.text(place + 0.03, height, label, fontsize=8, color=figures.INK, va="center")
        names = [*keys, f"loss, {content['measure']}", "overhead"]
        axes.set_xticks(range(len(names)), [name.replace(".", ".\n", 1) for name in names])
        axes.set_xlim(0, len(names) - 0.6)
        axes.set_yticks([])
        axes.grid(visible=True, axis="x", color=figures.INK, linewidth=0.8)
        axes.spines["left"].set_visible(False)
    return out[0]


def _axis(values: Sequence[Any], log: bool) -> tuple[list[float], list[tuple[float, str]]]:
    """Height in [0, 1] of every value, and the labelled heights of an axis."""
    if any(isinstance(value, str) for value in values):
        words = sorted(set(map(str, values)))
        place = {word: k / max(1, len(words) - 1) for k, word in enumerate(words)}
        return [place[str(value)] for value in values], [(height, word) for word, height in place.items()]
    low, high = min(values), max(values)
    scale = math.log if log else float
    span = scale(high) - scale(low)
    heights = [(scale(value) - scale(low)) / span if span else 0.5 for value in values]
    ticks = [(0.0, _text(low)), (1.0, _text(high))] if span else [(0.5, _text(low))]
    return heights, ticks


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _figure(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
