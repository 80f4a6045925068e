"""What MATES' influence model learns of the quickstart's LM, and what probing costs.

    python benchmarks/selection_mates.py
    python benchmarks/selection_mates.py --steps 10 --probes 64   # a quick look

The quickstart's LM is trained on random batches of the bundled corpus up to the end of a first stage; then sequences of
the pool are probed there. For each size of the influence model: rank correlation between predicted and oracle influence
on probes that were held out, over several splits, and the same with influences that were dealt out at random, which is
what learning nothing looks like. Also: how far two draws of target sequences agree on the probes' order, which bounds
what can be learnt, how far bf16 and fp32, and smaller learning rates, agree, and seconds. One process, no Ray.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from common import RESULTS, versions, where
from numpy.typing import NDArray

from ray_dwm.config import RunConfig, build, load, to_dict, to_yaml
from ray_dwm.config.selection import MatesConfig
from ray_dwm.data.records import read_metrics, write_whole
from ray_dwm.data.shards import Rows, open_shards
from ray_dwm.engine.loop import Trainer
from ray_dwm.engine.probe import Prober
from ray_dwm.engine.setup import build as build_parts
from ray_dwm.selection.influence import Fit, spearman

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


def trained(args: argparse.Namespace, storage: str) -> RunConfig:
    """A run that has ended a first stage."""
    overrides = [f"storage={storage}", "weighting.method=uniform", "cluster.workers=1", "tracking.wandb=off"]
    overrides += [f"data.{name}={args.data / name}" for name in ("train", "target")]
    overrides += [f"data.held_out.{name}={args.data / name}" for name in ("novels", "mixture")]
    config = load([CONFIG], overrides)
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.yaml").write_text(to_yaml(config))
    Trainer(build_parts(config, until=args.steps)).fit()
    return config


def rates(config: RunConfig, steps: int, rows: Rows, targets: int) -> dict[str, dict[str, float]]:
    """By learning rate: rank correlations of influences in bf16 and in fp32, and with those at the run's rate."""
    found, first = {}, None
    for lr in (config.train.lr, config.train.lr / 10, config.train.lr / 100):
        of = []
        for precision in ("fp32", "bf16"):
            values = to_dict(config)
            values["train"] |= {"lr": lr, "precision": precision}
            (config.run_dir / "config.yaml").write_text(to_yaml(build(RunConfig, values)))
            of.append(influences(config, steps, rows, targets)[0])
        first = of[0] if first is None else first
        found[f"{lr:g}"] = {"bf16_fp32": spearman(*of), "with_first_rate": spearman(first, of[0])}
    return found


def influences(config: RunConfig, steps: int, rows: Rows, targets: int, seed: int = 0) -> tuple[Any, float]:
    """Oracle influences, and seconds for one."""
    prober = Prober(config.run_dir, steps)
    started = time.perf_counter()
    found = prober.influences(rows, {"target": config.data.target}, targets, seed)
    return found, (time.perf_counter() - started) / len(rows)


def learnt(rows: Rows, values: NDArray[np.float64], size: str, splits: int) -> dict[str, Any]:
    """Correlations on held-out probes over splits, of the influences and of shuffled ones, and seconds of a fit."""
    options, seq_len = build(MatesConfig, {"size": size}), rows.input_ids.shape[1]
    shuffled = [np.random.default_rng(seed).permutation(values) for seed in range(splits)]
    started = time.perf_counter()
    found = [Fit(values, options, 8192, seq_len, seed)(rows) for seed in range(splits)]
    seconds = (time.perf_counter() - started) / splits
    nothing = [float(Fit(x, options, 8192, seq_len, seed)(rows)["spearman"]) for seed, x in enumerate(shuffled)]
    return {
        "spearman": [float(fitted["spearman"]) for fitted in found],
        "r2": [float(fitted["r2"]) for fitted in found],
        "spearman_shuffled": nothing,
        "fit_seconds": seconds,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("data/quickstart"))
    parser.add_argument("--steps", type=int, default=40, help="LM steps before probing, of the quickstart's 160")
    parser.add_argument("--probes", type=int, default=1024)
    parser.add_argument("--targets", type=int, default=64, help="target sequences of one loss")
    parser.add_argument("--sizes", nargs="+", default=["xs", "s"])
    parser.add_argument("--splits", type=int, default=4)
    parser.add_argument("--output", type=Path, default=RESULTS / "selection_mates.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as storage:
        config = trained(args, storage)
        reader = open_shards(config.data.train)
        chosen = np.sort(np.random.default_rng(1).choice(reader.manifest.rows, args.probes, replace=False))
        rows = reader.take(chosen)
        values, seconds = influences(config, args.steps, rows, args.targets)
        part = rows[np.arange(min(256, args.probes))]
        again, _ = influences(config, args.steps, part, args.targets, seed=1)
        by_rate = rates(config, args.steps, rows[np.arange(min(96, args.probes))], args.targets)
        lines = read_metrics(config.run_dir / "metrics.jsonl")
    step_seconds = mean(sum(v for k, v in line.items() if k.startswith("seconds/")) for line in lines[3:])
    content = {
        "benchmark": "selection_mates",
        "device": where(),
        "versions": versions(),
        "options": {key: value for key, value in vars(args).items() if key not in ("data", "output")},
        "spearman_between_target_draws": spearman(values[: len(part)], again),
        "spearman_by_learning_rate": by_rate,
        "probe_seconds": seconds,
        "step_seconds": step_seconds,
        "influence_by_domain": {
            name: [float(values[rows.domains == code].mean()), float(values[rows.domains == code].std())]
            for code, name in enumerate(reader.manifest.domain_names)
        },
        "models": {size: learnt(rows, values, size, args.splits) for size in args.sizes},
    }
    write_whole(args.output, json.dumps(content, indent=2) + "\n")
    print(f"two draws of {args.targets} target sequences: Spearman {content['spearman_between_target_draws']:.3f}")
    for lr, found in by_rate.items():
        print(f"learning rate {lr}: {', '.join(f'{key} {value:.3f}' for key, value in found.items())}")
    print(f"a probe {seconds:.3f} s, an LM step {step_seconds:.3f} s")
    for name, (average, deviation) in content["influence_by_domain"].items():
        print(f"{name:<12}{average:>12.2e} ± {deviation:.1e} nats")
    for size, found in content["models"].items():
        shown = [
            f"{key} {mean(found[key]):.2f} ± {stdev(found[key]):.2f}" for key in ("spearman", "spearman_shuffled", "r2")
        ]
        print(f"{size}: {', '.join(shown)}, {found['fit_seconds']:.0f} s")


if __name__ == "__main__":
    main()
