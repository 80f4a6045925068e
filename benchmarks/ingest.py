"""Ray Data ingest against a memory map of the same shards, and what it holds in memory.

    python benchmarks/ingest.py
    python benchmarks/ingest.py --gigabytes 0.2 0.4 --rounds 1   # a quick look

Workers are Ray actors, which read as a run's workers do, and turn the tokens into the int64 that an LM wants. Turn by
turn they read the same batches through Ray Data (`ray`), from the memory map in the same order (`map`), and from the
memory map row after row (`sequential`, for information). `eaten` is what the quickstart's LM takes in training.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil
import ray
import torch
from common import make_shards, parser, run_config, run_ranks, spread, timed_fit, write_manifest, write_result
from ray._private.internal_api import get_memory_info_reply, get_state_from_address

from ray_dwm.config import RunConfig
from ray_dwm.data.manifest import load_manifest
from ray_dwm.data.plan import ReadPlan
from ray_dwm.data.shards import Rows, open_shards, write_shard
from ray_dwm.engine.batch import LocalSource
from ray_dwm.orchestration import ingest
from ray_dwm.orchestration.cluster import connect

KINDS = ("ray", "map", "sequential")
FILE_ROWS = 65536
READER = "ray::Read"
"""How Ray titles a process while it runs a read task."""


def make_corpus(folder: Path, gigabytes: float, seq_len: int, vocab: int) -> None:
    """Shards of that size: the same random rows in every file, with sample ids of their own."""
    folder.mkdir(parents=True)
    rows = int(gigabytes * 1e9 / (seq_len * (2 if vocab <= 2**16 else 4)))
    ids = np.random.default_rng(0).integers(0, vocab, size=(min(rows, FILE_ROWS), seq_len)).astype(np.uint16)
    files = []
    for start in range(0, rows, FILE_ROWS):
        count = min(FILE_ROWS, rows - start)
        path, numbers = folder / f"part-{len(files):05}.arrow", np.arange(start, start + count)
        names = ["random"] * count
        files.append(write_shard(path, sample_ids=numbers, domains=names, input_ids=ids[:count], vocab_size=vocab))
    write_manifest(folder, files, {"random": rows}, seq_len, vocab)


def memory(pid: int | str = "self") -> dict[str, int]:
    """What a process holds, in bytes: memory of its own, and pages of mapped files (Linux)."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    sizes = {key: rest for key, _, rest in (line.partition(":") for line in lines)}
    return {name: int(sizes[key].split()[0]) * 1024 for name, key in (("own", "RssAnon"), ("files", "RssFile"))}


class Worker:
    """One rank of the readers."""

    def __init__(self, rank: int, world: int, prefetch: int, memory_mb: int) -> None:
        self._rank, self._world, self._prefetch, self._memory_mb = rank, world, prefetch, memory_mb

    def _stream(self, kind: str, folder: str, global_batch: int, batches: int) -> Iterator[Rows]:
        plan = ReadPlan(rows_per_file=load_manifest(folder).rows_per_file, global_batch=global_batch, seed=0)
        stop = batches or plan.batches_per_epoch
        if kind == "ray":
            source = ingest.RayDataSource(folder, plan, self._rank, self._world, self._prefetch, self._memory_mb)
            yield from source.stream(0, stop)
        elif kind == "map":
            yield from LocalSource(open_shards(folder), plan, self._rank, self._world).stream(0, stop)
        else:
            share = global_batch // self._world
            first = self._rank * stop * share
            for start in range(first, first + stop * share, share):
                yield open_shards(folder).take(np.arange(start, start + share))

    def read(self, kind: str, folder: str, global_batch: int, batches: int, step_s: float = 0.0) -> dict[str, Any]:
        """Read so many batches (0: an epoch), and compute for `step_s` after each."""
        begin = time.perf_counter()
        first = waited = 0.0
        tokens, most = 0, {"own": 0, "files": 0}
        asked = begin
        for index, rows in enumerate(self._stream(kind, folder, global_batch, batches)):
            tokens += rows.input_ids.astype(np.int64).size
            waited += (time.perf_counter() - asked) if index else 0.0
            first = first or time.perf_counter() - begin
            if index % 64 == 0:
                most = {key: max(most[key], value) for key, value in memory().items()}
            compute(step_s)
            asked = time.perf_counter()
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "first_s": first, "waited_s": waited, "tokens": tokens, "memory": most}


def compute(seconds: float) -> None:
    """Keep a core as busy as a training step does."""
    matrix, stop = torch.ones(256, 256), time.perf_counter() + seconds
    while time.perf_counter() < stop:
        matrix @ matrix


@contextmanager
def watched(title: str = READER) -> Iterator[dict[str, int]]:
    """The most that the object store and any one process of that title (`reader`) held meanwhile, in bytes.

    Ray has no public call for the store's use that is exact at an instant; `ray memory` prints this one's answer.
    """
    most = {"object_store": 0, "spilled": 0, "reader_own": 0, "reader_files": 0}
    state, over = get_state_from_address(ray.get_runtime_context().gcs_address), threading.Event()

    def sample() -> None:
        while not over.wait(0.02):
            store = get_memory_info_reply(state).store_stats
            found = {"object_store": store.object_store_bytes_used, "spilled": store.spilled_bytes_total}
            for process in psutil.process_iter():
                with suppress(psutil.Error, OSError, KeyError):  # it may have ended
                    if "".join(process.cmdline()[:1]).startswith(title):
                        for key, value in memory(process.pid).items():
                            found[f"reader_{key}"] = max(found.get(f"reader_{key}", 0), value)
            most.update({key: max(most[key], value) for key, value in found.items()})

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


def eaten(config: RunConfig, steps: int, rounds: int) -> list[float]:
    """Seconds of so many steps of the quickstart's training, several times."""
    return [timed_fit(config, steps, f"turn{turn}") for turn in range(rounds)]


class Bench:
    """The measurements on a running cluster."""

    def __init__(self, args: argparse.Namespace, config: RunConfig) -> None:
        self._args = args
        prefetch, memory_mb = config.data.prefetch_batches, config.cluster.ingest_memory_mb
        remote = ray.remote(num_cpus=1)(Worker)
        self._workers = {
            world: [remote.remote(rank, world, prefetch, memory_mb) for rank in range(world)] for world in (1, 2)
        }

    def turn(self, world: int, kind: str, folder: Path, batches: int, step_s: float = 0.0) -> list[dict[str, Any]]:
        """What each of `world` workers reports that read at once."""
        options = (kind, str(folder), self._args.read_batch, batches, step_s)
        found: list[dict[str, Any]] = ray.get([worker.read.remote(*options) for worker in self._workers[world]])
        return found

    def speed(self, world: int, folder: Path) -> dict[str, Any]:
        """Tokens/s of all workers together, turn by turn."""
        cold = self.turn(world, "ray", folder, 1)  # starts the readers' processes
        rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
        first = []
        for _ in range(self._args.rounds):
            for kind in KINDS:
                found = self.turn(world, kind, folder, self._args.batches)
                rates[kind].append(sum(f["tokens"] for f in found) / max(f["seconds"] for f in found))
                first += [f["first_s"] for f in found if kind == "ray"]
        ratios = [r / m for r, m in zip(rates["ray"], rates["map"], strict=True)]
        return {
            **{f"{kind}_tokens_per_s": spread(values) for kind, values in rates.items()},
            "ray_over_map": spread(ratios),
            "first_batch_s": {"cold": max(f["first_s"] for f in cold), **spread(first)},
        }

    def stall(self, folder: Path, step_s: float) -> dict[str, float]:
        """Of two workers that compute for `step_s` after every batch: part of the time in which they wait for one."""
        result = {"step_s": step_s}
        for kind in ("ray", "map"):
            found = self.turn(2, kind, folder, self._args.stall_steps, step_s)
            result[f"{kind}_waiting_fraction"] = max(f["waited_s"] / (f["seconds"] - f["first_s"]) for f in found)
        return result

    def held(self, folder: Path) -> dict[str, Any]:
        """What is held while one worker reads a whole corpus, in MB."""
        with watched() as most:
            (found,) = self.turn(1, "ray", folder, 0)
        sizes = {**most, "worker_own": found["memory"]["own"], "worker_files": found["memory"]["files"]}
        return {
            "tokens_per_s": found["tokens"] / found["seconds"],
            "first_batch_s": found["first_s"],
            **{f"{key}_mb": round(value / 1e6) for key, value in sizes.items()},
        }


def plan_seconds(tokens: float, seq_len: int) -> float:
    """Time to the first row numbers of an epoch of so many tokens."""
    files = int(tokens / seq_len / FILE_ROWS)
    begin = time.perf_counter()
    ReadPlan(rows_per_file=(FILE_ROWS,) * files, global_batch=512, seed=0).rows(0)
    return time.perf_counter() - begin


def measure(args: argparse.Namespace, folder: Path, config: RunConfig) -> dict[str, Any]:
    """All figures."""
    turns = run_ranks(eaten, config.cluster.workers, config, args.steps, args.rounds)
    tokens = args.steps * args.global_batch * args.seq_len
    result: dict[str, Any] = {"eaten_tokens_per_s": spread([tokens / s for s in turns])}
    corpora = {f"{size:g} GB": folder / f"corpus-{size:g}" for size in args.gigabytes}
    for path, size in zip(corpora.values(), args.gigabytes, strict=True):
        make_corpus(path, size, args.read_seq_len, args.read_vocab)
    connect(config)
    try:
        bench, smallest = Bench(args, config), next(iter(corpora.values()))
        result |= {f"workers {world}": bench.speed(world, smallest) for world in (1, 2)}
        result["stall"] = bench.stall(smallest, median(turns) / args.steps)
        result["held"] = {name: bench.held(path) for name, path in corpora.items()}
    finally:
        ray.shutdown()
    result["plan_of_30B_tokens_s"] = plan_seconds(30e9, args.read_seq_len)
    return result


def options() -> argparse.Namespace:
    """Command line."""
    p = parser("Ray Data ingest against a memory map", rounds=3)
    p.add_argument("--gigabytes", type=float, nargs="+", default=[1, 10], help="sizes of the corpora, ascending")
    p.add_argument("--read-seq-len", type=int, default=2048)
    p.add_argument("--read-vocab", type=int, default=50257, help="of the corpora, at most 65536")
    p.add_argument("--read-batch", type=int, default=64, help="sequences of a global batch of the corpora")
    p.add_argument("--batches", type=int, default=3000, help="batches of one turn")
    p.add_argument("--stall-steps", type=int, default=30, help="training steps that may wait for a batch")
    return p.parse_args()


def main() -> None:
    """Command line."""
    args = options()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_shards(folder / "train", 4 * args.global_batch, args.vocab, args.seq_len)
        config = run_config(args, folder, "weighting.method=uniform")
        result = measure(args, folder, config)
    settings = {"prefetch_batches": config.data.prefetch_batches, "ingest_memory_mb": config.cluster.ingest_memory_mb}
    for key, value in result.items():
        print(key)
        for what, figures in value.items() if isinstance(value, dict) else [("", value)]:
            print(f"  {what:<24}{figures}")
    print(f"written to {write_result('ingest', args, config, {'settings': settings, **result})}")


if __name__ == "__main__":
    main()
