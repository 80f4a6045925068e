"""Weak scaling over 1, 2 and 4 gloo ranks: tokens per second, and bytes over the loopback device beside the plan's.

    python benchmarks/scaling.py        (on a machine that does nothing else: its loopback traffic would be counted)

Every rank has the same number of sequences and one thread, whatever the number of ranks. Efficiency is the tokens per
second of a rank over that of a single one, and means something only while there is a core for each rank. Bytes are
what the kernel counts on `lo` for all processes together, with packet headers, over the same steps; the prediction is
`planning.predicted_traffic`, for all ranks together.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bilevel_bench import dwm_config, random_shards
from common import WARM_STEPS, parser, run_config, run_ranks, spread, timed_fit, write_result
from rich.console import Console
from rich.table import Table

from ray_dwm.config import RunConfig
from ray_dwm.planning.plan import predicted_traffic

KINDS = {"uniform": ["weighting.method=uniform"], "DWM": ["weighting.method=dwm"]}


def on_loopback() -> int:
    """Bytes sent over the loopback device since the machine started."""
    line = next(x for x in Path("/proc/net/dev").read_text().splitlines() if x.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[8])


def turn(config: RunConfig, steps: int, runs: int) -> dict[str, Any]:
    """Seconds of every run's steps, and bytes on the loopback device in a step, from runs of two lengths."""
    torch.set_num_threads(1)
    sent, seconds = [], []
    for index in range(runs):
        for length in (1, steps):  # what starting takes is in both
            before = on_loopback()
            took = timed_fit(config, length, f"run{index}-{length}")
            sent.append(on_loopback() - before)
        seconds.append(took)
    pairs = zip(sent[1::2], sent[::2], strict=True)
    return {"seconds": seconds, "bytes": [(long - short) / (steps - 1) for long, short in pairs]}


def options() -> argparse.ArgumentParser:
    """The command line; --global-batch is that of one rank."""
    p = parser("Weak scaling", global_batch=16, micro_batch=16, rounds=3, steps=21)
    p.add_argument("--target-batch", type=int, default=8, help="of all ranks")
    p.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 4])
    return p


def measure(args: argparse.Namespace, world: int, kind: str) -> dict[str, Any]:
    """One row: a number of ranks, with or without a DWM."""
    batch = args.global_batch * world
    own = argparse.Namespace(**{**vars(args), "global_batch": batch, "workers": world})
    with tempfile.TemporaryDirectory() as folder:
        random_shards(own, Path(folder))
        learning = ["bilevel.every=10", f"bilevel.warmup_steps={WARM_STEPS + 1}"]
        learning.append(f"bilevel.target_batch={args.target_batch}")
        config = dwm_config(own, Path(folder), *learning, *KINDS[kind])
        found = run_ranks(turn, world, config, args.steps, args.rounds)
        predicted = world * sum(predicted_traffic(config).values())
    rates = [args.steps * args.global_batch * args.seq_len / s for s in found["seconds"]]
    return {"tokens_per_s_per_rank": spread(rates), "bytes": median(found["bytes"]), "predicted_bytes": predicted}


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    table = Table("ranks", "weights", "tokens/s of a rank", "efficiency", "MB a step", "predicted", "ratio")
    for name, row in result.items():
        world, kind = name.split(", ")
        ratio = f"{row['predicted_bytes'] / row['bytes']:.3f}" if row["predicted_bytes"] else "-"
        figures = (f"{row['tokens_per_s_per_rank']['median']:,.0f}", f"{row['efficiency']:.2f}")
        table.add_row(world, kind, *figures, f"{row['bytes'] / 1e6:.2f}", f"{row['predicted_bytes'] / 1e6:.2f}", ratio)
    Console(width=110).print(table)
    print(f"{os.cpu_count()} cores: efficiency beyond as many ranks is what sharing them leaves")


def main() -> None:
    """Command line."""
    args = options().parse_args()
    result = {f"{world}, {kind}": measure(args, world, kind) for world in args.worlds for kind in KINDS}
    for name, row in result.items():
        alone = result[f"{args.worlds[0]}, {name.split(', ')[1]}"]
        row["efficiency"] = row["tokens_per_s_per_rank"]["median"] / alone["tokens_per_s_per_rank"]["median"]
    show(result)
    with tempfile.TemporaryDirectory() as folder:
        config = run_config(args, Path(folder), *KINDS["uniform"])
    print(f"written to {write_result('scaling', args, config, result)}")


if __name__ == "__main__":
    main()
