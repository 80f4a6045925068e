"""Every selection method on the bundled corpus, alone and under a DWM: losses, tokens and wall-clock.

    make selection-table
    python benchmarks/selection_table.py --seeds 0 --methods random dsir --steps 20   # a quick look

For each seed and method `train` selects as many tokens of the quickstart's pool as it trains on, and trains the
quickstart's LM on them, with uniform weights (alone) and with a DWM that is learnt meanwhile (+ DWM). Runs and
selections are kept in the storage: the same command continues. Seconds of selecting are those that the selection's
record says, of mates the stages'; a proxy LM counts for the first method of a seed that asked for it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import ray
from common import RESULTS, versions, where

from ray_dwm.config import RunConfig, load
from ray_dwm.data.records import digest, read_json, write_whole
from ray_dwm.orchestration.prepare import prepare_sets
from ray_dwm.orchestration.select import with_selection
from ray_dwm.orchestration.train import train
from ray_dwm.selection.record import RECORD

STEPS = 80
"""Of every run: half the quickstart's, for there are sixty of them."""
CONFIG = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
METHODS: dict[str, list[str]] = {  # to what the configuration says of each
    "random": [],
    "dwm": [],  # the DWM of the run on random data
    "dsir": [],
    "classifier": [],
    "perplexity": [],
    "curriculum, short first": ["selection.curriculum.criterion=length"],
    "curriculum, like the target first": ["selection.curriculum.criterion=similarity"],
    "dsdm": [],
    "doremi": [],
    "mates": [],
}
WEIGHTS = {"alone": "uniform", "+ DWM": "dwm"}


def run_config(args: argparse.Namespace, method: str, seed: int, weights: str) -> RunConfig:
    """A run of the table."""
    name = "".join(c if c.isalnum() else "-" for c in method)
    options = [f"data.selection={method.split(',')[0]}", *METHODS[method]]
    first = load([CONFIG])
    tokens = args.steps * first.train.global_batch * first.prepare.seq_len
    storage = f"{args.storage}/{args.steps}-steps/seed-{seed}"
    options += [f"storage={storage}", f"seed={seed}", f"name={name}-{weights}", f"weighting.method={weights}"]
    options += [f"selection.budget={0 if method == 'mates' else tokens}", "tracking.wandb=off"]
    if method == "dwm":
        train(with_selection(run_config(args, "random", seed, "dwm")))  # it is there, but on another machine
        options += [f"selection.dwm.folder={newest_dwm(Path(storage) / 'random-dwm')}"]
    return load([CONFIG], [*options, f"train.steps={args.steps}"])


def newest_dwm(run: Path) -> Path:
    """The last version of the DWM that the run on random data has learnt."""
    return max((run / "dwm").glob("v*"), default=run / "dwm" / "none")


def measure(config: RunConfig) -> dict[str, Any]:
    """Losses over whole sets, tokens, and seconds of selecting and of training."""
    config = with_selection(config)
    summary = train(config)
    stages, chosen = config.run_dir / "stages", Path(config.data.train)
    records = stages.glob(f"*/{RECORD}") if config.in_stages else [chosen / RECORD]
    return {
        "final": {key.split("/")[1]: value for key, value in summary["final"].items()},
        "tokens": summary["tokens"],
        "select_seconds": sum(read_json(path)["seconds"] for path in records),
        "train_seconds": summary["train_seconds"],
        "overhead_frac": summary["overhead_frac"],
    }


def table(runs: dict[str, dict[str, Any]], methods: list[str], seeds: list[int]) -> str:
    """Markdown: means over seeds with their standard deviation, of runs that are there for all seeds."""
    sets = list(next(iter(runs.values()))["final"])
    lines = [
        f"| method | weights | {' | '.join(f'{name} loss' for name in sets)} | tokens | selecting, s | training, s |"
    ]
    lines += ["|---|---|" + "---:|" * (len(sets) + 3)]
    for method in methods:
        for label, weights in WEIGHTS.items():
            found = [runs[key] for seed in seeds if (key := f"{method}/{weights}/{seed}") in runs]
            if len(found) < len(seeds):
                continue
            cells = [spread([run["final"][name] for run in found]) for name in sets]
            selecting = [runs[f"{method}/uniform/{seed}"]["select_seconds"] for seed in seeds]
            cells += [f"{found[0]['tokens']:,.0f}", f"{mean(selecting):.0f}"]
            cells += [f"{mean([run['train_seconds'] for run in found]):.0f}"]
            lines.append(f"| {method} | {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{mean(values):.4f}" + (f" ± {stdev(values):.4f}" if len(values) > 1 else "")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="NAME")
    parser.add_argument("--steps", type=int, default=STEPS, help="LM steps; another number has a result of its own")
    parser.add_argument("--storage", default="runs/selection-table")
    parser.add_argument("--output", type=Path, help="default: selection_table.json among the results")
    args = parser.parse_args()
    look = "" if args.steps == STEPS else f"-{args.steps}-steps"
    args.output = args.output or RESULTS / f"selection_table{look}.json"
    prepare_sets(load([CONFIG]), missing_only=True)
    content = json.loads(args.output.read_text()) if args.output.exists() else {"runs": {}}
    content |= {"benchmark": "selection_table", "device": where(), "versions": versions(), "methods": METHODS}
    content["config"] = CONFIG.read_text()
    made_of = digest(content["config"])[:12]
    for seed in args.seeds:
        for method in args.methods:
            for weights in WEIGHTS.values():
                key, of = (
                    f"{method}/{weights}/{seed}",
                    {"steps": args.steps, "options": METHODS[method], "config": made_of},
                )
                if content["runs"].get(key, {}).get("of") != of:  # of other options
                    measured = measure(run_config(args, method, seed, weights))
                    content["runs"][key] = {"of": of, **measured}
                    write_whole(args.output, json.dumps(content, indent=2) + "\n")
    ray.shutdown()
    text = table(content["runs"], args.methods, args.seeds)
    write_whole(args.output.with_suffix(".md"), text + "\n")
    print(f"{text}\nwritten to {args.output}")


if __name__ == "__main__":
    main()
