"""The memory model against measured peaks: predicted over measured bytes of a rank, for a plain and a bi-level step.

    python benchmarks/memory_model.py

Every case has processes of its own: gloo ranks on the CPU, where the resident set is measured, or one process with
CUDA, where the allocator's peak is. They first take the same steps with a tiny LM: what libraries then hold is no part
of what is measured, and `FRAMEWORK` of core/memory.py, which stands for that, no part of what is predicted.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bilevel_bench import dwm_config, random_shards, show
from bilevel_memory import peaks
from common import parser, run_ranks, write_result

from ray_dwm.config import RunConfig
from ray_dwm.planning.inputs import job
from ray_dwm.planning.memory import plain_peak, upper_peak

BAR = 0.1
"""Relative error that a prediction may have."""
CASES: dict[str, list[str]] = {
    "none": [],
    "selective": ["parallel.activation_checkpointing=selective"],
    "full": ["parallel.activation_checkpointing=full"],
    "chunks": ["parallel.loss_chunk=256"],
    "full, chunks": ["parallel.activation_checkpointing=full", "parallel.loss_chunk=256"],
    "no reshard": ["parallel.reshard_after_forward=false"],
    "copies": ["parallel.shard=1"],
    "half as long": ["lm.seq_len=SEQ/2"],
    "few tokens": ["lm.seq_len=SEQ/16"],
    "small LM": ["lm.preset=quickstart"],
    "accumulated": ["train.micro_batch=MICRO/2"],
    "central": ["bilevel.estimator=central"],
    "ghost": ["bilevel.estimator=ghost", "bilevel.target_at=theta"],
    "reuse": ["bilevel.reuse=2"],
    "audited": ["bilevel.fidelity_every=1"],
    "other precision": ["train.precision=OTHER"],
}
"""Name -> overrides; the first case's are the options'."""


def configs(args: argparse.Namespace, folder: Path) -> dict[str, RunConfig]:
    """The cases that are asked for, with one worker and, on the CPU, with two: the global batch grows with them."""
    filled = {
        "SEQ/2": str(args.seq_len // 2),
        "SEQ/16": str(args.seq_len // 16),
        "MICRO/2": str(args.micro_batch // 2),
        "OTHER": "fp32" if args.precision == "bf16" else "bf16",
    }
    found = {}
    for world in (1,) if torch.cuda.is_available() else (1, 2):
        for name in args.cases:
            if name == "copies" and world == 1:
                continue
            overrides = [o.replace(key, value) for o in CASES[name] for key, value in filled.items() if key in o]
            overrides += [o for o in CASES[name] if not any(key in o for key in filled)]
            batch = args.global_batch * world
            found[f"{name}, {world}"] = dwm_config(
                args,
                folder,
                f"train.global_batch={batch}",
                f"train.micro_batch={args.micro_batch}",
                f"bilevel.target_batch={args.target_batch * world}",
                f"cluster.workers={world}",
                f"cluster.gpus_per_worker={int(torch.cuda.is_available())}",
                *overrides,
            )
    return found


def warm_peaks(config: RunConfig) -> dict[str, int]:
    """`peaks`, once a tiny LM has taken the same steps."""
    peaks(dataclasses.replace(config, lm=dataclasses.replace(config.lm, preset="tiny")))
    gc.collect()
    return peaks(config)


def compare(config: RunConfig) -> dict[str, float]:
    """MiB predicted and measured, and their ratios."""
    # Read by glibc when a process starts: what is freed goes back at once, or a resident set is no measure of tensors.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    measured = run_ranks(warm_peaks, config.cluster.most_workers, config, fresh=True)
    planned = job(config)
    assert planned.upper is not None
    # Without an actor, parameters, gradients and moments of the DWM that learns are in this process's memory.
    learner = 0 if torch.cuda.is_available() else 4 * 4 * planned.dwm_parameters
    bilevel = upper_peak(planned, config.bilevel.fidelity_every > 0).plus(bilevel=learner)
    steps = {"plain": plain_peak(planned), "bilevel": bilevel}
    row: dict[str, Any] = {"seq_len": planned.seq_len, "precision": config.train.precision}
    for step, phase in steps.items():
        seen = measured[step] - measured["before"]
        row |= {f"{step}_phase": phase.name, f"{step}_predicted": phase.total / 2**20, f"{step}_measured": seen / 2**20}
        row[f"{step}_ratio"] = phase.total / seen
    return row


def report(result: dict[str, Any]) -> None:
    """Print the table."""
    rows = []
    for name, row in result.items():
        for step in ("plain", "bilevel"):
            predicted, measured, ratio = (row[f"{step}_{x}"] for x in ("predicted", "measured", "ratio"))
            fits = "yes" if abs(ratio - 1) <= BAR else "NO"
            rows.append([name, step, row[f"{step}_phase"], predicted, measured, ratio, fits])
    heads = ["case, workers", "step", "peak at", "predicted MiB", "measured MiB", "ratio", f"within {BAR:.0%}"]
    show("memory of a rank", heads, rows)


def main() -> None:
    """Measure the cases that are asked for, print them and write the file."""
    p = parser(__doc__.split("\n")[0], preset="30m", seq_len=256, global_batch=8, micro_batch=8)
    p.add_argument("--target-batch", type=int, default=4)
    p.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), metavar="CASE")
    args = p.parse_args()
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        random_shards(args, Path(name))
        found = configs(args, Path(name))
        for label, config in found.items():
            start = time.perf_counter()
            result[label] = compare(config)
            row, seconds = result[label], time.perf_counter() - start
            print(f"{label}: {row['plain_ratio']:.3f}, {row['bilevel_ratio']:.3f} ({seconds:.0f} s)", flush=True)
        report(result)
        print(f"written to {write_result('memory_model', args, next(iter(found.values())), result)}")


if __name__ == "__main__":
    main()
