"""The figure of benchmarks/bilevel.py, from its tables; a table that is not there leaves its panel empty."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from bilevel_bench import BILEVEL_PARTS, STEP_PARTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

EVERY = 10
USUAL = "quickstart"


def draw(tables: dict[str, Any], args: argparse.Namespace) -> Path:
    """Write the figure and return its path."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figures = {name: table["figures"] for name, table in tables.items()}
    fig, axes = plt.subplots(2, 3, figsize=(15, 8), layout="constrained")
    panels = (
        (_parts, "cost"),
        (_overhead, "cost"),
        (_ranks, "fidelity"),
        (_epsilons, "fidelity"),
        (_sampling, "fidelity"),
        (_growth, "growth"),
    )
    for (panel, name), axis in zip(panels, axes.flat, strict=True):
        if name in figures:
            panel(axis, figures[name])
        else:
            axis.set_axis_off()
    where = "gpu" if torch.cuda.is_available() else "cpu"
    path = Path(args.output) / f"bilevel-{where}{'' if args.preset == USUAL else '-' + args.preset}.png"
    fig.savefig(path, dpi=80)
    plt.close(fig)
    return path


def _parts(axis: Axes, cost: dict[str, Any]) -> None:
    """Stacked shares of a plain step at N = 10."""
    preset, found = next(iter(cost.items()))
    rows = {k: v for k, v in found["settings"].items() if str(1) in v["overhead_computed"]}
    left = [0.0] * len(rows)
    for part in (*STEP_PARTS, *BILEVEL_PARTS):
        scale = 100.0 if part in STEP_PARTS else 100.0 / EVERY
        widths = [max(0.0, scale * row["parts_over_plain"][part]["median"]) for row in rows.values()]
        axis.barh(list(rows), widths, left=left, label=part)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.invert_yaxis()
    axis.set(title=f"overhead by part at N = {EVERY}, {preset}", xlabel="% of plain training (computed)")
    axis.legend(fontsize=7)


def _overhead(axis: Axes, cost: dict[str, Any]) -> None:
    """Computed overhead against N, and what whole runs took."""
    computed: dict[str, float] = {}
    for (preset, found), style in zip(cost.items(), ("-", "--"), strict=False):
        shown = ("default", "fast", "central", "one_sided", "ghost")
        for color, name in ((i, name) for i, name in enumerate(shown) if name in found["settings"]):
            computed = found["settings"][name]["overhead_computed"]
            values = [100 * x for x in computed.values()]
            axis.plot([int(n) for n in computed], values, style, color=f"C{color}", label=f"{name}, {preset}")
        for color, name in enumerate(("default", "fast")):
            if name in found.get("direct", {}):
                s = found["direct"][name]["overhead"]
                bars = [[100 * (s["median"] - s["min"])], [100 * (s["max"] - s["median"])]]
                axis.errorbar([EVERY], [100 * s["median"]], bars, fmt="o", color=f"C{color}", capsize=3)
    axis.axhline(5, color="grey", linewidth=0.8)
    axis.set(title="overhead against N (computed; points: whole runs)", xlabel="N", ylabel="%", yscale="log")
    axis.set_xticks([int(n) for n in computed])
    axis.legend(fontsize=7)


def _curve(axis: Axes, rows: dict[str, Any], prefix: str, label: str, color: str, style: str) -> None:
    """1 - cosine of the phi-gradient over the number in a row's name."""
    named = {float(k.removeprefix(prefix)): v["phi"] for k, v in rows.items() if k.startswith(prefix)}
    for figure, width in (("median", 1.5), ("min", 0.5)):
        errors = [max(1e-9, 1 - v[figure]) for v in named.values()]
        axis.plot(list(named), errors, style, color=color, linewidth=width, label=label if width > 1 else None)


def _ranks(axis: Axes, fidelity: dict[str, Any]) -> None:
    for color, precision in enumerate(("fp32", "bf16")):
        _curve(axis, fidelity["rank"][precision], "", precision, f"C{color}", "o-")
    axis.set(title="ghost_lowrank: 1 - cosine of the phi-gradient", xlabel="rank", yscale="log")
    axis.set_xscale("log", base=2)
    axis.legend(fontsize=7, title="thin: worst point", title_fontsize=7)


def _epsilons(axis: Axes, fidelity: dict[str, Any]) -> None:
    for color, rule in enumerate(("central ", "one_sided ")):
        for precision, style in (("fp32", "o-"), ("bf16", "o--")):
            _curve(axis, fidelity["epsilon"][precision], rule, f"{rule}{precision}", f"C{color}", style)
    axis.set(title="finite differences: 1 - cosine of the phi-gradient", xlabel="|h u|", xscale="log", yscale="log")
    axis.legend(fontsize=7)


def _sampling(axis: Axes, fidelity: dict[str, Any]) -> None:
    """Noise of small target batches, for every contracted part of the batch."""
    curves: dict[str, dict[str, float]] = {}
    for name, row in fidelity["sampling"]["fp32"].items():
        size, part = name.split(" targets, ")
        curves.setdefault(part, {})[size] = row["phi"]["median"]
    for part, values in curves.items():
        axis.plot(list(values), list(values.values()), "o-", label=part)
    axis.set(title="sampling noise (no error): cosine of the phi-gradient", xlabel="target sequences")
    axis.legend(fontsize=7, title="contracted", title_fontsize=7)


def _growth(axis: Axes, growth: dict[str, Any]) -> None:
    """Seconds of a bi-level step, and of weighing, over sizes relative to the smallest."""
    for color, (what, table) in enumerate(growth.items()):
        name = "weigh" if what == "DWM parameters" else "bilevel"
        sizes = [row["size"] / table["rows"][0]["size"] for row in table["rows"]]
        slope = table["exponent"][name]
        label = f"{name}, {what}" + ("" if slope is None else f": exponent {slope:.2f}")
        axis.plot(sizes, [row["seconds"][name] for row in table["rows"]], "o-", color=f"C{color}", label=label)
    axis.set(title="growth", xlabel="size over the smallest", ylabel="seconds", xscale="log", yscale="log")
    axis.legend(fontsize=7)
