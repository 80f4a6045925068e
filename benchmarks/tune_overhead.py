"""What Tune itself costs: a sweep against the same trials, run one after another without it, on one Ray cluster.

    python benchmarks/tune_overhead.py        (on a machine that does nothing else)

Both run in the same process, in turn, one trial at a time, the sweep with its study and its report; the cluster, the
data and one run to warm up come before. The order changes from round to round.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RESULTS, spread, write_result

from ray_dwm.config import RunConfig
from ray_dwm.config.tune import TuneConfig, load_tune, scale_config
from ray_dwm.data.records import read_json
from ray_dwm.orchestration.cluster import connect
from ray_dwm.orchestration.prepare import prepare_sets
from ray_dwm.orchestration.train import train
from ray_dwm.orchestration.trial import trial_config
from ray_dwm.orchestration.tune import tune

SWEEP = Path(__file__).resolve().parents[1] / "configs/tune/quickstart.yaml"


def by_tune(config: TuneConfig) -> float:
    """Seconds of a sweep, from its checks to its report."""
    started = time.perf_counter()
    tune(config)
    return time.perf_counter() - started


def one_by_one(config: TuneConfig, trials: list[dict[str, Any]], folder: Path) -> float:
    """Seconds of the same trials without Tune."""
    base = scale_config(config, config.first)
    started = time.perf_counter()
    for trial in trials:
        given = {**trial["values"], "folder": trial["id"], "control": trial["control"]}
        train(trial_config(base, given, folder))
    return time.perf_counter() - started


def measure(args: argparse.Namespace, folder: Path) -> tuple[RunConfig, dict[str, list[float]]]:
    """Seconds of every round of both."""
    own = [f"storage={folder}", f"trials={args.trials}", f"train.steps={args.steps}"]
    whole = load_tune(SWEEP, [*own, "concurrent=1", "promote=0", "name=plan"])
    config = dataclasses.replace(whole, scales={whole.first: whole.scales[whole.first]}, transfer=())
    base = scale_config(config, config.first)
    connect(base)
    prepare_sets(base, missing_only=True)
    train(dataclasses.replace(base, name="warm"))
    tune(config)  # says which trials these are; the same seed gives them again
    trials = read_json(config.folder / "report.json")["trials"]
    seconds: dict[str, list[float]] = {"tune": [], "one_by_one": []}
    for turn in range(args.rounds):
        again = dataclasses.replace(config, name=f"turn-{turn}")
        for name in list(seconds)[:: 1 if turn % 2 else -1]:
            took = by_tune(again) if name == "tune" else one_by_one(config, trials, folder / f"plain-{turn}")
            seconds[name].append(took)
    return base, seconds


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=5, help="with the two controls")
    parser.add_argument("--steps", type=int, default=48, help="LM steps of each trial")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    args.preset = "quickstart"
    with tempfile.TemporaryDirectory() as folder:
        config, seconds = measure(args, Path(folder))
    ratios = [a / b - 1 for a, b in zip(seconds["tune"], seconds["one_by_one"], strict=True)]
    result = {"seconds": seconds, "overhead": spread(ratios)}
    print(f"Tune adds {result['overhead']['median']:.1%} ({seconds})")
    print(f"written to {write_result('tune_overhead', args, config, result)}")


if __name__ == "__main__":
    main()
