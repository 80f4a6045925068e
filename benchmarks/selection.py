"""DSIR against the published package on the same shards and cores, and what a selection holds in memory.

    python benchmarks/selection.py
    python benchmarks/selection.py --gigabytes 0.1 0.2 --rounds 1   # a quick look

Speed: from the shards of the bundled corpus to the selected tenth of it, turn by turn. `package` is data-selection
1.0.3 with as many processes as ours has tasks; it reads the same shards and decodes them with the same tokenizer, one
document at a time, as it takes documents, and writes text. Memory and time against the pool's size: random tokens,
`selection.dsir.features=tokens`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
from common import parser, run_config, spread, write_result
from ingest import make_corpus, memory, watched

from ray_dwm.config import PrepareConfig, RunConfig, load
from ray_dwm.data.manifest import load_manifest
from ray_dwm.data.shards import open_shards
from ray_dwm.data.tokenization import FOLDER, Tokenizer
from ray_dwm.orchestration.cluster import connect
from ray_dwm.orchestration.prepare import prepare
from ray_dwm.orchestration.select import select

CORPUS = Path(__file__).resolve().parents[1] / "corpus"
TASK = "ray::Map"
"""How Ray titles a process while it runs a unit of work."""


def select_config(pool: Path, target: Path, output: Path, *overrides: str) -> RunConfig:
    """A selection of a tenth of the pool by DSIR."""
    manifest = load_manifest(pool)
    options = [f"data.train={pool}", f"data.target={target}", "data.selection=dsir", f"selection.output={output}"]
    return load([], [*options, f"selection.budget={manifest.rows * manifest.seq_len // 10}", *overrides])


def ours(pool: Path, target: Path, output: Path, tasks: int) -> float:
    """Seconds from shards to shards."""
    started = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        select(select_config(pool, target, output, f"selection.tasks={tasks}"))
    return time.perf_counter() - started


def texts(folder: str) -> Iterator[dict[str, str]]:
    """The sequences of a folder of shards as documents."""
    reader, tokenizer = open_shards(folder), Tokenizer(f"{folder}/{FOLDER}")
    for start in range(0, reader.manifest.rows, 1024):
        for ids in reader.take(np.arange(start, min(start + 1024, reader.manifest.rows))).input_ids:
            yield {"text": tokenizer.decode(ids.tolist())}


def package(pool: Path, target: Path, output: Path, tasks: int) -> float:
    """Seconds of the published package, from shards to text."""
    from data_selection import HashedNgramDSIR

    started = time.perf_counter()
    with contextlib.redirect_stderr(io.StringIO()):
        dsir = HashedNgramDSIR(
            [str(pool)],
            [str(target)],
            cache_dir=str(output / "cache"),
            raw_load_dataset_fn=texts,
            target_load_dataset_fn=texts,
            num_proc=tasks,
            min_example_length=0,
        )
        dsir.fit_importance_estimator()
        dsir.compute_importance_weights()
        dsir.resample(str(output / "selected"), load_manifest(pool).rows // 10, cache_dir=str(output / "parts"))
    return time.perf_counter() - started


def speed(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Tokens/s of both, turn by turn."""
    settings = PrepareConfig(tokenizer=str(CORPUS / "tokenizer"), seq_len=args.seq_len)
    with contextlib.redirect_stdout(io.StringIO()):
        for name, text in {"train": args.text or CORPUS / "train", "target": CORPUS / "target"}.items():
            prepare(f"prepare.{name}", str(text), folder / name, settings)
    pool, target = folder / "train", folder / "target"
    manifest = load_manifest(pool)
    tokens = manifest.rows * manifest.seq_len
    ours(pool, target, folder / "warm", args.tasks)  # starts the processes of the tasks
    rates: dict[str, list[float]] = {"ours": [], "package": []}
    for turn in range(args.rounds):
        for name, function in (("package", package), ("ours", ours)):
            output = folder / f"{name}-{turn}"
            rates[name].append(tokens / function(pool, target, output, args.tasks))
            print(f"  round {turn + 1}, {name}: {rates[name][-1]:,.0f} tokens/s", flush=True)
            shutil.rmtree(output)
    ratios = [a / b for a, b in zip(rates["ours"], rates["package"], strict=True)]
    return {
        "tokens": tokens,
        **{f"{name}_tokens_per_s": spread(values) for name, values in rates.items()},
        "ours_over_package": spread(ratios),
    }


def held(folder: Path, gigabytes: float, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and the most that is held while a pool of that size is selected from, in MB."""
    pool, target = folder / f"pool-{gigabytes:g}", folder / "random_target"
    make_corpus(pool, gigabytes, args.pool_seq_len, args.pool_vocab)
    if not target.exists():
        make_corpus(target, 0.002, args.pool_seq_len, args.pool_vocab)
    options = ["selection.dsir.features=tokens", f"selection.tasks={args.tasks}"]
    started = time.perf_counter()
    with watched(TASK) as most, contextlib.redirect_stdout(io.StringIO()):
        select(select_config(pool, target, folder / "out", *options))
    seconds = time.perf_counter() - started
    rows = load_manifest(pool).rows
    for name in (pool, folder / "out"):
        shutil.rmtree(name)
    return {
        "tokens": rows * args.pool_seq_len,
        "tokens_per_s": rows * args.pool_seq_len / seconds,
        "seconds": seconds,
        **{f"task_{key.removeprefix('reader_')}_mb": round(v / 1e6) for key, v in most.items() if "reader" in key},
        **{f"{key}_mb": round(most[key] / 1e6) for key in ("object_store", "spilled")},
        "driver_own_mb": round(memory()["own"] / 1e6),
    }


def main() -> None:
    """Command line."""
    p = parser("Selection: DSIR against the published package, and memory", rounds=3)
    p.add_argument("--tasks", type=int, default=2, help="at the same time, and processes of the package")
    p.add_argument("--text", default="", help="of the pool on which both are timed; default: the bundled corpus")
    p.add_argument("--gigabytes", type=float, nargs="+", default=[1.25, 2.5, 5], help="sizes of the pools of tokens")
    p.add_argument("--pool-seq-len", type=int, default=1024)
    p.add_argument("--pool-vocab", type=int, default=32000)
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = run_config(args, folder, "weighting.method=uniform")
        connect(config)
        try:
            result: dict[str, Any] = {"dsir": speed(folder, args)}
            result["held"] = {}
            for size in args.gigabytes:
                figures = held(folder, size, args)
                result["held"][f"{size:g} GB"] = figures
                print(f"  {size:g} GB: {figures}", flush=True)
        finally:
            ray.shutdown()
    for what, value in result["dsir"].items():
        print(f"  {what:<24}{value}")
    print(f"written to {write_result('selection', args, config, result)}")


if __name__ == "__main__":
    main()
