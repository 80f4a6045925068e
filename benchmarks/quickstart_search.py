"""How the quickstart's DWM settings were found: variants of configs/quickstart.yaml, several seeds each.

    ray-dwm prepare --config configs/quickstart.yaml
    python benchmarks/quickstart_search.py --seeds 0 1 2

Trains every variant as the quickstart does, with two FSDP ranks, but without Ray, and compares its losses with the
uniform run of the same seed. Results are added to those of earlier calls.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from common import RESULTS, run_ranks, versions

from ray_dwm.analysis.verdict import crossing
from ray_dwm.config import RunConfig, load
from ray_dwm.data.records import read_metrics
from ray_dwm.engine.loop import Trainer
from ray_dwm.engine.setup import build

CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
# The settings before ghost_lowrank was there; most of the search was made with them.
FIRST = ["bilevel.estimator=central", "bilevel.target_batch=32", "bilevel.every=10"]
VARIANTS: dict[str, list[str]] = {
    "uniform": ["weighting.method=uniform"],
    "quickstart": [],
    "every 10": ["bilevel.every=10"],
    "every 10, 16 targets": ["bilevel.every=10", "bilevel.target_batch=16"],
    "shuffled weights": ["dwm.control=shuffled"],
    "random weights": ["dwm.control=random"],
    "shuffled target": ["dwm.control=shuffled_target"],
    "loss, linupper": ["weighting.method=loss"],
    "joint_update_aware": ["weighting.method=joint_update_aware"],
    "ghost": ["bilevel.estimator=ghost", "bilevel.target_at=theta"],
    "first": FIRST,
    "first, kl 0.25": [*FIRST, "bilevel.kl=0.25"],
    "first, kl 1": [*FIRST, "bilevel.kl=1"],
    "first, kl 2": [*FIRST, "bilevel.kl=2"],
    "first, no clipping": [*FIRST, "dwm.clip_norm=0"],
    "first, one update": [*FIRST, "bilevel.updates=1"],
    "first, every 5": [*FIRST, "bilevel.every=5"],
    "first, every 20": [*FIRST, "bilevel.every=20"],
    "first, size s": [*FIRST, "dwm.size=s"],
    "first, LM features": [*FIRST, "dwm.lm_features=true"],
    "updates 5": ["bilevel.updates=5"],
    "updates 5, kl 0.1": ["bilevel.updates=5", "bilevel.kl=0.1"],
    "updates 5, lr x2": ["bilevel.updates=5", "dwm.lr=6e-3"],
    "updates 10": ["bilevel.updates=10"],
    "every 2, lr x3": ["bilevel.every=2", "dwm.lr=9e-3"],
    "every 2, lr x3, size s": ["bilevel.every=2", "dwm.lr=9e-3", "dwm.size=s"],
}


def train(config: RunConfig) -> dict[str, Any]:
    """Final losses over whole sets, the target curve and the weights' mean ESS."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(build(config))
    trainer.fit()
    final = trainer.evaluate()
    if dist.get_rank():
        return {}
    lines = read_metrics(config.run_dir / "metrics.jsonl")
    ess = [line["dwm/ess"] / config.train.global_batch for line in lines if "dwm/ess" in line]
    curve = [(line["tokens"], line["val/target/loss"]) for line in lines if "val/target/loss" in line]
    return {"final": final, "target_curve": curve, "mean_ess": sum(ess) / len(ess) if ess else 1.0}


def measure(seed: int, variant: str, everywhere: list[str]) -> dict[str, Any]:
    """One run; that it failed is a result too."""
    folder = Path(tempfile.mkdtemp())
    overrides = [f"seed={seed}", f"storage={folder}", "tracking.wandb=off", f"checkpoint.every={10**9}"]
    config = load([CONFIG], [*overrides, *everywhere, *VARIANTS[variant]])
    start = time.perf_counter()
    try:
        result = run_ranks(train, config.cluster.workers, config)
    except Exception as error:  # a rank's error arrives as text
        result = {"failed": str(error).strip().splitlines()[-1]}
    finally:
        shutil.rmtree(folder)
    run = {"seed": seed, "variant": variant, "overrides": [*everywhere, *VARIANTS[variant]], **result}
    return {**run, "seconds": time.perf_counter() - start}


def tokens_saved(run: dict[str, Any], uniform: dict[str, Any]) -> str:
    """Change of the tokens after which the target loss is at the uniform run's last, as the verdict has it."""
    tokens, losses = zip(*run["target_curve"], strict=True)
    total, level = uniform["target_curve"][-1]
    reached = crossing(list(tokens), list(losses), level)
    return "never" if reached is None else f"{reached / total - 1:+.0%}"


def table(runs: list[dict[str, Any]]) -> str:
    """Differences to the uniform run of the same seed, mean over seeds with their range."""
    base = {run["seed"]: run for run in runs if run["variant"] == "uniform"}
    sets = list(next(iter(base.values()))["final"])
    lines = [f"{'variant':<22}{'seeds':>6}{'ESS':>6}" + "".join(f"{name[4:-5]:>26}" for name in sets) + "  tokens"]
    for variant in VARIANTS:
        done = [run for run in runs if run["variant"] == variant and "final" in run and run["seed"] in base]
        failed = sum(run["variant"] == variant and "failed" in run for run in runs)
        if not done:
            lines += [f"{variant:<22}{failed:>6}  failed"] if failed else []
            continue
        line = f"{variant:<22}{len(done):>6}{sum(run['mean_ess'] for run in done) / len(done):>6.0%}"
        for name in sets:
            gaps = [run["final"][name] - base[run["seed"]]["final"][name] for run in done]
            line += f"{sum(gaps) / len(gaps):>+10.3f} [{min(gaps):+.3f}, {max(gaps):+.3f}]".rjust(26)
        line += "  " + " ".join(tokens_saved(run, base[run["seed"]]) for run in done)
        lines.append(line + (f"  ({failed} failed)" if failed else ""))
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--variants", nargs="*", default=list(VARIANTS), metavar="NAME", help="none: only print the table"
    )
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="for all variants")
    parser.add_argument("--output", type=Path, default=RESULTS / "quickstart_search.json")
    args = parser.parse_args()
    unknown = set(args.variants) - VARIANTS.keys()
    if unknown:
        parser.error(f"no variant {min(unknown)!r}: use {', '.join(VARIANTS)}")
    content = json.loads(args.output.read_text()) if args.output.exists() else {"runs": []}
    if args.variants:
        content |= {"benchmark": "quickstart_search", "versions": versions(), "config": CONFIG.read_text()}
    for seed in args.seeds:
        for variant in args.variants:
            kept = [run for run in content["runs"] if (run["seed"], run["variant"]) != (seed, variant)]
            content["runs"] = [*kept, measure(seed, variant, args.set)]
            args.output.write_text(json.dumps(content, indent=2) + "\n")
            print(f"seed {seed} {variant}: {content['runs'][-1].get('final', 'failed')}", flush=True)
    print(table(content["runs"]))


if __name__ == "__main__":
    main()
