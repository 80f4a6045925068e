"""What the DWM costs: training with it against the same loop without, turn by turn, and where the time goes.

    python benchmarks/bilevel_overhead.py

`overhead` is the ratio of the times minus 1. The DWM's own update is timed apart: in a Ray run an actor does it
beside training, here the training process does, so `overhead_beside` leaves it out.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from common import make_shards, parser, run_config, run_ranks, spread, timed_fit, write_result

from ray_dwm.config import RunConfig
from ray_dwm.data.records import read_metrics
from ray_dwm.engine.learner import Feedback, LocalWeightService
from ray_dwm.engine.setup import build_learner, check_data


class TimedService(LocalWeightService):
    """Notes how long the DWM's updates take."""

    seconds = 0.0

    def submit(self, feedback: Feedback) -> None:
        """See WeightService."""
        start = time.perf_counter()
        super().submit(feedback)
        self.seconds += time.perf_counter() - start


def turn(config: RunConfig, steps: int, name: str) -> dict[str, Any]:
    """Seconds of a turn, mean seconds of the phases of a step, and of the parts of a bi-level step."""
    service = TimedService(build_learner(config, check_data(config)))
    seconds = timed_fit(config, steps, name, service)
    lines = read_metrics(config.run_dir.parent / name / "metrics.jsonl")[2:]
    result = {"turn_s": seconds, **_means(lines, "seconds/")}
    bilevel = [line for line in lines if "bilevel_seconds/contraction" in line]
    if bilevel:
        result |= _means(bilevel, "bilevel_seconds/")
        result["dwm_update"] = service.seconds / len(bilevel)
    return result


def _means(lines: list[dict[str, float]], prefix: str) -> dict[str, float]:
    keys = [key for key in lines[0] if key.startswith(prefix)]
    return {key.removeprefix(prefix): sum(line[key] for line in lines) / len(lines) for key in keys}


def measure(uniform: RunConfig, dwm: RunConfig, steps: int, rounds: int) -> list[list[dict[str, float]]]:
    """Pairs of turns: without and with the DWM."""
    return [[turn(uniform, steps, f"uniform{i}"), turn(dwm, steps, f"dwm{i}")] for i in range(rounds)]


def summary(pairs: list[list[dict[str, float]]], updates: int) -> dict[str, Any]:
    """Ratios within each pair; parts of a bi-level step in units of that pair's plain step."""
    parts = ("target_gradient", "direction", "contraction", "watch", "fidelity", "dwm_update")
    return {
        "overhead": spread([b["turn_s"] / a["turn_s"] - 1 for a, b in pairs]),
        "overhead_beside": spread([(b["turn_s"] - updates * b["dwm_update"]) / a["turn_s"] - 1 for a, b in pairs]),
        "weigh_over_step": spread([b["weigh"] / a["step"] for a, b in pairs]),
        **{f"{name}_over_step": spread([b[name] / a["step"] for a, b in pairs]) for name in parts},
        "step_s": spread([a["step"] for a, _ in pairs]),
    }


def main() -> None:
    """Command line."""
    options = parser("Cost of the DWM over the same loop without it", steps=20, rounds=5)
    options.add_argument("--every", type=int, default=10, help="LM steps between two bi-level steps")
    options.add_argument("--target-batch", type=int, default=16)
    options.add_argument("--estimator", default="ghost_lowrank")
    options.add_argument("--size", default="xs", help="size of the DWM")
    args = options.parse_args()
    if args.steps % args.every:
        options.error("--steps must be a multiple of --every")
    overrides = [f"bilevel.every={args.every}", f"bilevel.estimator={args.estimator}", f"dwm.size={args.size}"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_shards(folder / "train", 4 * args.global_batch, args.vocab, args.seq_len)
        make_shards(folder / "target", 4 * args.target_batch, args.vocab, args.seq_len)
        overrides += ["bilevel.warmup_steps=2", "bilevel.fidelity_every=0", f"bilevel.target_batch={args.target_batch}"]
        dwm = run_config(args, folder, f"data.target={folder / 'target'}", *overrides)
        uniform = run_config(args, folder, "weighting.method=uniform")
        pairs = run_ranks(measure, dwm.cluster.workers, uniform, dwm, args.steps, args.rounds)
    result = summary(pairs, args.steps // args.every)
    for key, figures in result.items():
        print(f"{key:<26}" + "  ".join(f"{name} {value:7.3f}" for name, value in figures.items()))
    print(f"written to {write_result('bilevel_overhead', args, dwm, result)}")


if __name__ == "__main__":
    main()
