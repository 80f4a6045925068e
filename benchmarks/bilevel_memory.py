"""Table `memory`: a rank's peak memory in a step with a bi-level step, over that in a plain step.

Every setting has processes of its own. `ratio` leaves out what the process held before the LM was built (Python, torch
and their libraries), so that it means on a CPU what it means on a GPU; `ratio_of_process` does not.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from bilevel_bench import Bench, dwm_config, random_shards, settings, show
from bilevel_cost import lms
from common import peak_of, resident, run_ranks

from ray_dwm.config import RunConfig
from ray_dwm.engine.mesh import all_gather_rows, device

BAR = 1.15
WIDER = ("default", "central")
"""Settings that are measured with the wider LM."""


def peaks(config: RunConfig) -> dict[str, int]:
    """Bytes: before anything is built, and at the peaks of both kinds of step; the most of all ranks."""
    before = resident()
    bench = Bench(config)
    bench.plain()
    plain = peak_of(bench.plain)  # before there is a DWM, which plain training does not have
    bench.seat("dwm", config)
    bench.turn("dwm")
    both = peak_of(lambda: bench.turn("dwm"))
    most = all_gather_rows(torch.tensor([[before, plain, both]], device=device())).amax(0)
    return dict(zip(("before", "plain", "bilevel"), most.tolist(), strict=True))


def summarise(found: dict[str, int]) -> dict[str, float]:
    """A setting's row."""
    before, plain, both = (found[name] for name in ("before", "plain", "bilevel"))
    return {
        "plain_mib": (plain - before) / 2**20,
        "bilevel_mib": (both - before) / 2**20,
        "ratio": (both - before) / (plain - before),
        "ratio_of_process": both / plain if before else (both - before) / (plain - before),
    }


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The table."""
    result: dict[str, Any] = {"bar": BAR}
    for index, options in enumerate(lms(args)):
        with tempfile.TemporaryDirectory() as name:
            random_shards(options, Path(name))
            chosen = {k: v for k, v in settings(options).items() if index == 0 or k in WIDER}
            configs = {k: dwm_config(options, Path(name), *v) for k, v in chosen.items()}
            result[options.preset] = {
                k: summarise(run_ranks(peaks, config.cluster.workers, config, fresh=True))
                for k, config in configs.items()
            }
    return result


def report(result: dict[str, Any]) -> None:
    """Print the table."""
    for preset, found in result.items():
        if preset != "bar":
            rows = [[name, *row.values(), "yes" if row["ratio"] <= BAR else "NO"] for name, row in found.items()]
            heads = ["setting", "plain MiB", "bi-level MiB", "ratio", "ratio of process", f"<= {BAR}"]
            show(f"memory, {preset}, per rank", heads, rows)
