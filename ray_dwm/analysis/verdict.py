"""Did the weighting help? One table, win or lose."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ray_dwm.analysis.runs import Run
from ray_dwm.config import to_dict


@dataclass(frozen=True, slots=True)
class Row:
    """One measure of the uniform and of the weighted run; `better` is who won."""

    measure: str
    uniform: str
    weighted: str
    difference: str
    better: str


def tokens_to_reach(run: Run, key: str, level: float) -> float | None:
    """Tokens after which a loss first fell to a level, between evaluations by a straight line; None if never."""
    return crossing(*run.series(key), level)


def crossing(tokens: list[float], losses: list[float], level: float) -> float | None:
    """Where a curve first falls to a level, between its points by a straight line; None if never."""
    for index, loss in enumerate(losses):
        if loss <= level:
            if index == 0:
                return tokens[0]
            share = (losses[index - 1] - level) / (losses[index - 1] - loss)
            return tokens[index - 1] + share * (tokens[index] - tokens[index - 1])
    return None


def differences(uniform: Run, weighted: Run) -> list[str]:
    """Sections of the configuration, besides those that weights need, in which a pair of runs differs."""
    left, right = to_dict(uniform.config), to_dict(weighted.config)
    return [key for key in ("seed", "data", "lm", "train") if left[key] != right[key]]


def verdict(uniform: Run, weighted: Run) -> list[Row]:
    """The rows of the verdict table, over the sets that both runs have."""
    rows = []
    shared = uniform.summary["final"].keys() & weighted.summary["final"].keys()
    for key in sorted(shared, key=lambda k: (k != "val/target/loss", k)):
        a, b = uniform.summary["final"][key], weighted.summary["final"][key]
        name = key.removeprefix("val/").removesuffix("/loss")
        label = "target loss" if name == "target" else f"held-out loss ({name})"
        rows.append(Row(label, f"{a:.4f}", f"{b:.4f}", f"{b - a:+.4f}", _better(a, b, weighted)))
    if "val/target/loss" in shared:
        rows.append(_tokens(uniform, weighted))
    a, b = uniform.summary["train_seconds"], weighted.summary["train_seconds"]
    rows.append(Row("training time", f"{a:.0f} s", f"{b:.0f} s", f"{b / a - 1:+.1%}", _better(a, b, weighted)))
    share = weighted.summary["overhead_frac"]
    rows.append(Row(f"overhead (phases of the {weighted.label} run)", "", f"{share:.1%}", "", ""))
    return rows


def sentence(uniform: Run, weighted: Run) -> str:
    """The verdict for somebody who reads one sentence: the target loss, or else the first set that both runs have."""
    shared = sorted(
        uniform.summary["final"].keys() & weighted.summary["final"].keys(), key=lambda k: (k != "val/target/loss", k)
    )
    if not shared:
        return "The runs have no evaluation set in common."
    name = shared[0].removeprefix("val/").removesuffix("/loss")
    place = "the target set" if name == "target" else name
    gap = weighted.summary["final"][shared[0]] - uniform.summary["final"][shared[0]]
    if gap == 0:
        return f"{weighted.label} and uniform weights end with the same loss on {place}."
    word = "better" if gap < 0 else "worse"
    return (
        f"{weighted.label} ends {word} than uniform weights on {place}: {gap:+.4f} nats per token, a perplexity "
        f"{math.expm1(gap):+.1%}."
    )


def _tokens(uniform: Run, weighted: Run) -> Row:
    level = uniform.series("val/target/loss")[1][-1]  # of the same sequences as the weighted run's curve
    reached = tokens_to_reach(weighted, "val/target/loss", level)
    total = uniform.summary["tokens"]
    return Row(
        "tokens to uniform's final target loss",
        f"{total:,.0f}",
        "not reached" if reached is None else f"{reached:,.0f}",
        "" if reached is None else f"{reached / total - 1:+.0%}",
        "uniform" if reached is None else _better(total, reached, weighted),
    )


def _better(uniform: float, value: float, weighted: Run) -> str:
    return "tie" if uniform == value else weighted.label if value < uniform else "uniform"


def format_table(rows: list[Row], label: str) -> str:
    """The verdict for the terminal; `label` is the weighted run's."""
    width = max(14, len(label) + 2)
    lines = [f"{'':<42}{'uniform':>14}{label:>{width}}{'difference':>12}  better"]
    lines += [f"{r.measure:<42}{r.uniform:>14}{r.weighted:>{width}}{r.difference:>12}  {r.better}" for r in rows]
    return "\n".join(lines)
