"""Table `fidelity`: how near alignments and phi-gradient are to the exact ones, at several points of a training run.

    settings     every setting through the engine, against the definition: target gradient at theta', this step's
                 target sequences, the contracted sequences. An error of the estimator (and of bf16)
    rank         of ghost_lowrank, the same
    epsilon      of finite differences, with the exact u
    target_at    the exact contraction, but v at theta, or at theta' of 10 steps ago on the same target sequences
    sampling     the exact contraction of a part of the batch with a small target batch, against all sequences and the
                 whole target pool. NOISE that the levers of cost bring, which averages out over updates: no error.
                 The pool contains the small batch, which flatters large ones a little

`alignment` is the cosine after centring, `phi` that of the DWM's gradient (this point's DWM, without the KL term).
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bilevel_bench import dwm_config, oracles, settings, show, small
from bilevel_probe import AGE, Plan, Tables, walk
from common import run_ranks, write_tokens, zipf_tokens

from ray_dwm.config import RunConfig, load

ROOT = Path(__file__).resolve().parents[1]
MEANING = {
    "settings": "error of the estimator",
    "rank": "error of the estimator: ghost_lowrank",
    "epsilon": "error of the estimator: finite differences with the exact u",
    "target_at": f"error of where the target gradient is taken; stale is {AGE} steps old, same target sequences",
    "sampling": "NOISE of a small target batch and of a part of the batch, not an error: it averages out over updates",
}


def quickstart(args: argparse.Namespace, storage: Path) -> RunConfig | None:
    """configs/quickstart.yaml on its real text; None where that is not there and cannot be prepared."""
    config = load([ROOT / "configs" / "quickstart.yaml"], [f"storage={storage}", "tracking.wandb=off"])

    def at_root(paths: dict[str, str]) -> dict[str, str]:
        return {name: str(ROOT / path) for name, path in paths.items()}

    p, d = config.prepare, config.data
    names = ("train", "target")
    prepare = replace(
        p,
        tokenizer=str(ROOT / p.tokenizer),
        held_out=at_root(p.held_out),
        **at_root({name: getattr(p, name) for name in names}),
    )
    data = replace(d, held_out=at_root(d.held_out), **at_root({name: getattr(d, name) for name in names}))
    config = replace(config, prepare=prepare, data=data)
    if not all(Path(path).exists() for path in (data.train, data.target)):
        if importlib.util.find_spec("ray") is None:
            return None
        import ray

        from ray_dwm.orchestration.prepare import prepare_sets

        prepare_sets(config, missing_only=True)
        ray.shutdown()
    cluster = replace(config.cluster, workers=1 if torch.cuda.is_available() else args.workers)
    return replace(config, data=replace(data, held_out={}), cluster=cluster)


def synthetic(args: argparse.Namespace, folder: Path) -> RunConfig:
    """Zipf-distributed tokens of two domains, one of which is the target's."""
    generator = torch.Generator().manual_seed(0)
    for name, rows, domains in (("train", 32 * args.global_batch, 2), ("target", max(64, args.target_pool), 1)):
        ids = zipf_tokens(args.vocab, rows, args.seq_len, domains, generator).numpy()
        write_tokens(folder / name, ids, [f"domain{i % domains}" for i in range(rows)], args.vocab)
    every = ["bilevel.every=10", "bilevel.warmup_steps=10", "train.precision=fp32"]
    return dwm_config(args, folder, *every, f"train.steps={max(20, *args.points) + 1}")


def summarise(found: list[Tables]) -> dict[str, Any]:
    """Median and least over points, and over draws where there are several."""
    result: dict[str, Any] = {}
    for name, rows in found[0].items():
        table, precision = name.split(", ")
        summary = {}
        for row in rows:
            pairs = [pair for tables in found for pair in tables[name][row]]
            columns = zip(("alignment", "phi"), zip(*pairs, strict=True), strict=True)
            summary[row] = {c: {"median": statistics.median(v), "min": min(v)} for c, v in columns}
        result.setdefault(table, {"meaning": MEANING[table]})[precision] = summary
    return result


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        text = quickstart(args, folder) if args.preset == "quickstart" and args.corpus == "auto" else None
        config = text or synthetic(args, folder)
        config = replace(config, bilevel=replace(config.bilevel, target_batch=args.target_batch, fidelity_every=0))
        chosen = settings(args) | {name: value for name, value in oracles(args).items() if name == "jvp"}
        bilevels = {name: load([], overrides).bilevel for name, overrides in chosen.items()}
        plan = Plan(args.points, bilevels, args.target_pool, small(args.preset))
        found = run_ranks(walk, config.cluster.workers, config, plan)
    return {
        "corpus": "the quickstart's text" if text else "SYNTHETIC: Zipf-distributed tokens of two domains",
        "run": "configs/quickstart.yaml" if text else "this file's `config`, every 10th step bi-level",
        "reference": "exact" if plan.exact else "Richardson's rule",
        "points": list(args.points),
        "target_pool": args.target_pool,
        **summarise(found),
    }


def report(result: dict[str, Any]) -> None:
    """Print the table."""
    print(f"fidelity on {result['corpus']}, after {result['points']} steps; cosines to {result['reference']}")
    for table in MEANING:
        found = result[table]
        precisions = [name for name in found if name != "meaning"]
        rows = []
        for row in found[precisions[0]]:
            cosines = [found[p][row][c][s] for p in precisions for c in ("alignment", "phi") for s in ("median", "min")]
            rows.append([row, *[f"{x:.6f}" for x in cosines]])
        heads = [head for p in precisions for head in (f"alignment {p}", "min", f"phi {p}", "min")]
        show(f"{table}: {found['meaning']}", [table, *heads], rows)
