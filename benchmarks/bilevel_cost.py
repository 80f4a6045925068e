"""Table `cost`: what the DWM adds to training, by setting, N and part of a bi-level step.

Two figures that must not be mixed up:
    direct      whole runs of the real loop at N = 10, with and without a DWM, turn by turn: the ratio of their times
    computed    (what every step adds + what a bi-level step adds / N) / plain step, from the medians of its parts,
                where plain steps and bi-level steps of all settings took turns on one LM
Neither has the DWM's own update, which an actor does beside training: it is stated apart. What no clock inside a
bi-level step sees (`elsewhere`) is in the first and stated apart in the second.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from bilevel_bench import (
    BILEVEL_PARTS,
    STEP_PARTS,
    Bench,
    TimedService,
    column,
    dwm_config,
    fresh_share,
    oracles,
    percent,
    random_shards,
    settings,
    show,
)
from common import run_ranks, spread, timed_fit

from ray_dwm.config import RunConfig
from ray_dwm.engine.checks import check_data
from ray_dwm.engine.given import build_learner
from ray_dwm.models.presets import parameter_count

EVERY = (1, 5, 10, 20)
APART = ("elsewhere", "dwm_update")
DIRECT = ("default", "fast")
DIRECT_EVERY = 10


def take_turns(
    base: RunConfig, trained: dict[str, RunConfig], oracle: dict[str, RunConfig], rounds: int
) -> dict[str, list[dict[str, float]]]:
    """Pairs of every setting, `rounds` of them or as many as a target gradient lasts; of an oracle one, at the end."""
    bench = Bench(base)
    for name, config in {**trained, **oracle}.items():
        bench.seat(name, config)
    bench.plain()  # the optimizer makes its state
    pairs: dict[str, list[dict[str, float]]] = {name: [] for name in trained}
    wanted = {name: max(rounds, config.bilevel.reuse) for name, config in trained.items()}
    for turn in range(max(wanted.values()) + 1):
        for name in (name for name in trained if turn <= wanted[name]):
            pair = bench.pair(name)
            if turn:  # buffers are made in the first
                pairs[name].append(pair)
    return {**pairs, **{name: [bench.pair(name)] for name in oracle}}


def take_runs(configs: dict[str, RunConfig], steps: int, rounds: int) -> dict[str, list[list[float]]]:
    """[seconds of a run, of which the DWM's updates], `rounds` of each."""
    found: dict[str, list[list[float]]] = {name: [] for name in configs}
    for turn in range(rounds):
        for name, config in configs.items():
            learns = config.weighting.method == "dwm"
            service = TimedService(build_learner(config, check_data(config))) if learns else None
            seconds = timed_fit(config, steps, f"{name}{turn}", service)
            found[name].append([seconds, service.seconds * steps / config.bilevel.every if service else 0.0])
    return found


def summarise(pairs: list[dict[str, float]], config: RunConfig, every: tuple[int, ...]) -> dict[str, Any]:
    """A setting's row: shares of a plain step, and the overhead computed from them."""
    parts = {part: column(pairs, part) for part in (*BILEVEL_PARTS, *STEP_PARTS, *APART, "plain")}
    plain = parts["plain"]["median"]
    over = {k: {s: x / plain for s, x in v.items()} for k, v in parts.items() if k != "plain"}
    always = sum(over[part]["median"] for part in STEP_PARTS)
    gradient = over["target_gradient"]["median"]
    rest = sum(over[part]["median"] for part in BILEVEL_PARTS) - gradient

    def bilevel(n: int) -> float:
        return rest + gradient * fresh_share(config.bilevel, n)

    return {
        "pairs": len(pairs),
        "plain_s": parts["plain"],
        "parts_over_plain": over,
        "every_step_over_plain": always,
        "bilevel_step_over_plain": bilevel(DIRECT_EVERY),
        "overhead_computed": {str(n): always + bilevel(n) / n for n in every},
    }


def summarise_runs(found: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Overheads of whole runs, taken within each turn."""
    result: dict[str, Any] = {"every": DIRECT_EVERY, "plain_run_s": spread([s for s, _ in found["plain"]])}
    for name in (name for name in DIRECT if name in found):
        turns = list(zip(found["plain"], found[name], strict=True))
        result[name] = {
            "overhead": spread([(b - update) / a - 1 for (a, _), (b, update) in turns]),
            "overhead_with_dwm_update": spread([b / a - 1 for (a, _), (b, _) in turns]),
        }
    return result


def measure_lm(args: argparse.Namespace, rounds: int, runs: int) -> dict[str, Any]:
    """The table's part for one LM."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_shards(args, folder)
        plain = dwm_config(args, folder, "weighting.method=uniform")
        overrides = settings(args)
        trained = {k: dwm_config(args, folder, *v) for k, v in overrides.items()}
        oracle = {k: dwm_config(args, folder, *v) for k, v in oracles(args).items()}
        pairs = run_ranks(take_turns, plain.cluster.workers, plain, trained, oracle, rounds)
        result: dict[str, Any] = {
            "parameters": parameter_count(args.preset, args.vocab),
            **{k: getattr(args, k) for k in ("global_batch", "seq_len", "micro_batch", "target_batch")},
            "settings": {
                k: summarise(pairs[k], config, EVERY if k in trained else (DIRECT_EVERY,))
                for k, config in {**trained, **oracle}.items()
            },
        }
        if runs:
            every = f"bilevel.every={DIRECT_EVERY}"
            whole = {k: dwm_config(args, folder, *overrides[k], every) for k in DIRECT if k in trained}
            steps = DIRECT_EVERY * max(1, args.steps // DIRECT_EVERY)
            found = run_ranks(take_runs, plain.cluster.workers, {"plain": plain, **whole}, steps, runs)
            result["direct"] = {"steps": steps, "runs": runs, **summarise_runs(found)}
    return result


def lms(args: argparse.Namespace) -> list[argparse.Namespace]:
    """The options for every LM of the table: the preset and, where one is named, a wider one with shorter sequences."""
    if not args.wider:
        return [args]
    return [args, argparse.Namespace(**{**vars(args), "preset": args.wider, "seq_len": args.wider_seq_len})]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The table."""
    result = {}
    for index, options in enumerate(lms(args)):
        rounds, runs = (args.rounds, args.runs) if index == 0 else (max(1, args.rounds // 2), args.wider_runs)
        result[options.preset] = measure_lm(options, rounds, runs)
    return result


def report(result: dict[str, Any]) -> None:
    """Print the table."""
    for preset, found in result.items():
        rows = []
        for name, row in found["settings"].items():
            computed, parts = row["overhead_computed"], row["parts_over_plain"]
            figures = [parts[part]["median"] for part in (*STEP_PARTS, *BILEVEL_PARTS, *APART)]
            rows.append([name, *[percent(computed.get(str(n))) for n in EVERY], *[f"{x:.3f}" for x in figures]])
        plain = found["settings"]["default"]["plain_s"]["median"]
        title = f"cost, {preset}, {found['global_batch']} x {found['seq_len']} tokens, plain step {plain:.3f} s; "
        heads = ["setting", *[f"N={n}" for n in EVERY], *STEP_PARTS, *BILEVEL_PARTS, *APART]
        show(title + "overhead COMPUTED from parts (shares of a plain step)", heads, rows)
        if "direct" in found:
            direct = found["direct"]
            print(
                f"overhead MEASURED on whole runs of {direct['steps']} steps, N={DIRECT_EVERY}, {direct['runs']} turns:"
            )
            for name in (name for name in DIRECT if name in direct):
                s = direct[name]["overhead"]
                print(f"    {name:<8} {s['median']:.2%} ({s['min']:.2%} .. {s['max']:.2%})")
