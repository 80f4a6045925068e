"""Table `growth`: how the cost of a bi-level step grows with batch, sequence length, LM and DWM.

One size varies, the others stay. `exponent` is the slope of log(seconds) over log(size), by least squares: 1 is
proportional, 0 constant. The bi-level step is the default setting's; against the DWM's size, what counts is `weigh`,
which every step pays.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from bilevel_bench import BILEVEL_PARTS, Bench, column, dwm_config, random_shards, show
from common import run_ranks

from ray_dwm.config import RunConfig
from ray_dwm.models.dwm import SIZES, build_dwm, dwm_shape
from ray_dwm.models.presets import PRESETS, parameter_count

FACTORS = (0.25, 0.5, 1, 2)
Case = tuple[str, str, int, RunConfig]
"""(what varies, its value for people, its size, configuration)"""


def time_cases(cases: list[Case], rounds: int) -> list[list[dict[str, float]]]:
    """Pairs of a plain and a bi-level step, `rounds` of them for each case."""
    found = []
    for _, _, _, config in cases:
        bench = Bench(config)
        bench.seat("dwm", config)
        bench.pair("dwm")
        found.append([bench.pair("dwm") for _ in range(rounds)])
        del bench
        gc.collect()  # before the next one is built, and not while it is timed
    return found


def make_cases(args: argparse.Namespace, folder: Path) -> list[Case]:
    """Half the options' batch and length; the varied size from a quarter of that to twice, or by preset."""
    batch, length = args.global_batch // 2, args.seq_len // 2
    base = [f"train.global_batch={batch}", f"lm.seq_len={length}", f"bilevel.target_batch={args.target_batch}"]

    def case(what: str, label: object, size: float, *overrides: str) -> Case:
        return what, str(label), int(size), dwm_config(args, folder, *base, *overrides)

    cases = []
    for size in (int(batch * f) for f in FACTORS):
        if size >= max(2, args.workers):
            cases.append(case("global batch", size, size, f"train.global_batch={size}"))
    for size in (int(length * f) for f in FACTORS):
        if size >= 2:
            cases.append(case("sequence length", size, size, f"lm.seq_len={size}"))
    names = list(PRESETS)
    last = max(names.index(preset) for preset in (args.preset, args.wider) if preset)
    for preset in names[max(0, last - 2) : last + 1]:
        cases.append(case("LM parameters", preset, parameter_count(preset, args.vocab), f"lm.preset={preset}"))
    for name in SIZES:
        dwm = build_dwm(dwm_shape(name, args.vocab), seed=0)
        cases.append(case("DWM parameters", name, sum(p.numel() for p in dwm.parameters()), f"dwm.size={name}"))
    return cases


def exponent(sizes: list[int], seconds: list[float]) -> float | None:
    """Slope of log(seconds) over log(size); None where there is no line to fit."""
    if len(sizes) < 2 or min(seconds) <= 0:
        return None
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def summarise(cases: list[Case], found: list[list[dict[str, float]]]) -> dict[str, Any]:
    """Rows and exponents of every varied size."""
    result: dict[str, Any] = {}
    for (what, label, size, _), pairs in zip(cases, found, strict=True):
        parts = {part: column(pairs, part)["median"] for part in BILEVEL_PARTS}
        plain, weigh = column(pairs, "plain")["median"], column(pairs, "weigh")["median"]
        seconds = {"plain": plain, "bilevel": sum(parts.values()), "weigh": weigh, **parts}
        over = {name: value / plain for name, value in seconds.items() if name != "plain"}
        rows = result.setdefault(what, {"rows": []})["rows"]
        rows.append({"value": label, "size": size, "seconds": seconds, "over_plain": over})
    for what, table in result.items():
        sizes = [row["size"] for row in table["rows"]]
        wanted = ("plain", "weigh") if what == "DWM parameters" else ("plain", "bilevel", "target_gradient", "weigh")
        table["exponent"] = {name: exponent(sizes, [row["seconds"][name] for row in table["rows"]]) for name in wanted}
    return result


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The table."""
    with tempfile.TemporaryDirectory() as name:
        random_shards(args, Path(name))
        cases = make_cases(args, Path(name))
        found = run_ranks(time_cases, cases[0][3].cluster.workers, cases, max(2, args.rounds // 2))
    result = summarise(cases, found)
    for what, table in result.items():
        fixed = {"global batch": args.global_batch // 2, "sequence length": args.seq_len // 2, "LM": args.preset}
        table["fixed"] = {
            "target batch": args.target_batch,
            **{k: v for k, v in fixed.items() if not what.startswith(k)},
        }
    return result


def report(result: dict[str, Any]) -> None:
    """Print the table."""
    names = ("plain", "bilevel", "target_gradient", "direction", "contraction", "watch", "weigh")
    rows = []
    for what, table in result.items():
        for row in table["rows"]:
            seconds, over = row["seconds"], row["over_plain"]
            rows.append([what, row["value"], *[f"{seconds[n]:.4f}" for n in names], percent_of(over)])
        slopes = [table["exponent"].get(name) for name in names]
        rows.append(["", "exponent", *["" if s is None else f"{s:.2f}" for s in slopes], ""])
    show("growth, seconds", ["varies", "value", *names, "bi-level / plain"], rows)


def percent_of(over: dict[str, float]) -> str:
    """The bi-level step in units of a plain step."""
    return f"{over['bilevel']:.3f}"
