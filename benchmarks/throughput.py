"""Tokens per second, MFU and peak memory of our loop, layout by layout, with and without a DWM, turn by turn.

    python benchmarks/throughput.py --preset 370m --vocab 32000 --seq-len 2048 --precision bf16 ...

Every contender runs the whole loop on synthetic shards, in processes of its own because of its peak memory; the rounds
go around all of them. MFU counts the model's FLOPs (PaLM, appendix B), nothing that is computed again, against the
device's dense peak; a device without a known peak has none. One that runs out of memory is said to.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from bilevel_bench import dwm_config, random_shards
from common import parser, peak_of, run_ranks, spread, timed_fit, write_result
from rich.console import Console
from rich.table import Table

from ray_dwm.config import RunConfig
from ray_dwm.core.accounting import mfu
from ray_dwm.core.hardware import recognise
from ray_dwm.engine.mesh import device
from ray_dwm.models.presets import flops_per_token

CHUNK = "parallel.loss_chunk=8192"
COMPILE = "parallel.compile=true"
PLAIN = "weighting.method=uniform"
CONTENDERS = {
    "eager": [PLAIN],
    "loss chunks": [PLAIN, CHUNK],
    "compiled": [PLAIN, COMPILE],
    "compiled, loss chunks": [PLAIN, COMPILE, CHUNK],
    "compiled, selective AC, loss chunks": [PLAIN, COMPILE, CHUNK, "parallel.activation_checkpointing=selective"],
    "compiled, full AC, loss chunks": [PLAIN, COMPILE, CHUNK, "parallel.activation_checkpointing=full"],
    "DWM, eager": ["weighting.method=dwm"],
    "DWM, compiled, loss chunks": ["weighting.method=dwm", COMPILE, CHUNK],
}


def options() -> argparse.ArgumentParser:
    """The command line."""
    p = parser("Throughput of layouts", steps=20, rounds=3)
    p.add_argument("--target-batch", type=int, default=8)
    p.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME")
    return p


def turn(config: RunConfig, steps: int) -> dict[str, Any]:
    """One contender's turn on one rank: seconds and peak bytes, or that there was too little memory."""
    seconds = []
    try:
        peak = peak_of(lambda: seconds.append(timed_fit(config, steps, "turn")))
    except torch.cuda.OutOfMemoryError:
        return {"seconds": None, "peak": None}
    return {"seconds": seconds[0], "peak": peak, "world": dist.get_world_size()}


def contender(args: argparse.Namespace, folder: Path, name: str) -> RunConfig:
    """A contender's configuration: bi-level steps from the first timed step on, every 10."""
    learning = ["bilevel.every=10", "bilevel.warmup_steps=2", f"bilevel.target_batch={args.target_batch}"]
    return dwm_config(args, folder, *learning, *CONTENDERS[name])


def summarise(args: argparse.Namespace, config: RunConfig, turns: list[dict[str, Any]]) -> dict[str, Any]:
    """A contender's row."""
    if any(t["seconds"] is None for t in turns):
        return {"out_of_memory": True}
    tokens, world = args.steps * args.global_batch * args.seq_len, turns[0]["world"]
    rates = [tokens / t["seconds"] / world for t in turns]
    flops = flops_per_token(args.preset, args.vocab, args.seq_len)
    row = {
        "tokens_per_s_per_worker": spread(rates),
        "tflops_per_worker": median(rates) * flops / 1e12,
        "peak_gib": max(t["peak"] for t in turns) / 2**30,
    }
    gpu = recognise(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
    if gpu is not None:
        row["mfu"] = mfu(median(rates), flops, gpu.peak(config.train.precision == "bf16"))
    return row


def show(result: dict[str, Any]) -> None:
    """Print the table."""
    table = Table("layout", "tokens/s per worker", "range", "TFLOP/s", "MFU", "peak GiB", title="throughput")
    for name, row in result.items():
        if row.get("out_of_memory"):
            table.add_row(name, "out of memory")
            continue
        rate = row["tokens_per_s_per_worker"]
        mfu = f"{row['mfu']:.1%}" if "mfu" in row else "-"
        span = f"{rate['min']:,.0f} ... {rate['max']:,.0f}"
        figures = (f"{rate['median']:,.0f}", span, f"{row['tflops_per_worker']:.3g}", mfu, f"{row['peak_gib']:.2f}")
        table.add_row(name, *figures)
    Console(width=120).print(table)


def main() -> None:
    """Command line."""
    args = options().parse_args()
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in args.contenders}
    for _ in range(args.rounds):
        for name in args.contenders:
            with tempfile.TemporaryDirectory() as folder:
                random_shards(args, Path(folder))
                config = contender(args, Path(folder), name)
                turns[name].append(run_ranks(turn, config.cluster.most_workers, config, args.steps))
    result = {name: summarise(args, config, found) for name, found in turns.items()}
    show(result)
    print(f"on {device().type}; written to {write_result('throughput', args, config, result)}")


if __name__ == "__main__":
    main()
