"""What the benchmarks share: synthetic shards, gloo or NCCL ranks, timed loops, result files. Needs no Ray."""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import gc
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from numpy.typing import NDArray
from torch import Tensor

from ray_dwm import __version__
from ray_dwm.config import RunConfig, load, to_dict
from ray_dwm.data.manifest import DomainStats, Manifest, ShardFile
from ray_dwm.data.shards import Rows, open_shards, write_shard
from ray_dwm.engine.batch import BatchSource, LocalSource
from ray_dwm.engine.checks import check_data, read_plan
from ray_dwm.engine.clock import synchronize
from ray_dwm.engine.learner import WeightService
from ray_dwm.engine.loop import Trainer
from ray_dwm.engine.mesh import device, init_mesh
from ray_dwm.engine.setup import build

multiprocessing.set_forkserver_preload(
    ["transformers.models.llama.modeling_llama", "ray_dwm.engine.loop", "ray_dwm.engine.export"]
)
RESULTS = Path(__file__).parent / "results"
WARM_STEPS = 2


def parser(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """Options that every benchmark takes."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--preset", default="quickstart")
    p.add_argument("--vocab", type=int, default=8192)
    p.add_argument("--seq-len", type=int, default=128)
    p.add_argument("--global-batch", type=int, default=64)
    p.add_argument("--micro-batch", type=int, default=32)
    p.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    p.add_argument("--workers", type=int, default=2, help="gloo ranks; with CUDA always 1")
    p.add_argument("--steps", type=int, default=12, help="LM steps that are timed in one turn")
    p.add_argument("--rounds", type=int, default=7, help="turns of each contender, interleaved")
    p.add_argument("--output", type=Path, default=RESULTS)
    p.set_defaults(**defaults)
    return p


def make_shards(folder: Path, rows: int, vocab: int, seq_len: int) -> None:
    """Random tokens of one domain: their values do not change how long a step takes."""
    write_tokens(folder, np.random.default_rng(0).integers(0, vocab, size=(rows, seq_len)), ["random"] * rows, vocab)


def write_tokens(folder: Path, ids: NDArray[np.integer], domains: list[str], vocab: int) -> None:
    """A folder of shards that holds these sequences."""
    folder.mkdir(parents=True)
    rows, seq_len = ids.shape
    numbers = np.arange(rows)
    file = write_shard(folder / "part.arrow", sample_ids=numbers, domains=domains, input_ids=ids, vocab_size=vocab)
    write_manifest(folder, [file], {name: domains.count(name) for name in sorted(set(domains))}, seq_len, vocab)


def write_manifest(folder: Path, files: Sequence[ShardFile], counts: dict[str, int], seq_len: int, vocab: int) -> None:
    """The manifest of shards with so many rows of each domain."""
    Manifest(
        folder=folder,
        seq_len=seq_len,
        vocab_size=vocab,
        eos_token_id=0,
        tokenizer_name="none",
        tokenizer_sha256="0" * 64,
        files=tuple(files),
        domains={k: DomainStats(rows=n, tokens=n * seq_len, bytes_per_token=1.0) for k, n in counts.items()},
        made_by={},
    ).write()


def zipf_tokens(vocab: int, sequences: int, seq_len: int, domains: int, generator: torch.Generator) -> Tensor:
    """Zipf-distributed ids; the sequences take turns among domains, which differ in which ids are frequent.

    With domains alike, alignments are near 0 and a comparison of them would be one of rounding errors.
    """
    rank_BT = (vocab ** torch.rand(sequences, seq_len, generator=generator)).long() - 1
    domain_B = torch.arange(sequences) % domains
    return (rank_BT + domain_B[:, None] * (vocab // 2)) % vocab


def run_config(args: argparse.Namespace, folder: Path, *overrides: str) -> RunConfig:
    """A run over the synthetic shards, without evaluation during training."""
    workers = 1 if torch.cuda.is_available() else args.workers
    return load(
        [],
        [
            f"storage={folder / 'runs'}",
            f"data.train={folder / 'train'}",
            f"lm.preset={args.preset}",
            f"train.steps={args.steps + WARM_STEPS + 1}",
            f"train.global_batch={args.global_batch}",
            f"train.micro_batch={args.micro_batch}",
            f"train.precision={args.precision}",
            f"train.eval_every={10**9}",
            f"checkpoint.every={10**9}",
            f"cluster.workers={workers}",
            "tracking.wandb=off",
            *overrides,
        ],
    )


class Measured(Exception):
    """A run has lasted as long as it was to be timed."""


class TimedSource:
    """Passes batches on, and times the loop from the delivery of one to the delivery of a later one.

    Raises:
        Measured: at the later one, so that no time goes into evaluating and saving what nobody wants.
    """

    def __init__(self, source: BatchSource, steps: int) -> None:
        self._source, self._steps = source, steps
        self.seconds = 0.0
        """Duration of `steps` whole steps after the warm ones."""

    def stream(self, first_batch: int, stop_batch: int) -> Iterator[Rows]:
        """See BatchSource."""
        start = 0.0
        for index, rows in enumerate(self._source.stream(first_batch, stop_batch)):
            if index == WARM_STEPS:
                start = now()
            elif index == WARM_STEPS + self._steps:
                self.seconds = now() - start
                raise Measured
            yield rows


def timed_fit(config: RunConfig, steps: int, name: str, service: WeightService | None = None) -> float:
    """Seconds of `steps` steps of a run of that name, from its start."""
    config = dataclasses.replace(config, name=name)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    plan = read_plan(config, check_data(config))
    local = LocalSource(open_shards(config.data.train), plan, dist.get_rank(), dist.get_world_size())
    source = TimedSource(local, steps)
    with suppress(Measured):
        Trainer(build(config, source=source, service=service)).fit()
    return source.seconds


def now() -> float:
    """The clock, once the device has done what it was given."""
    synchronize()
    return time.perf_counter()


def resident() -> int:
    """Bytes that this process holds now: on the GPU where there is one, else in memory (Linux)."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)  # what is freed must not pass for memory in use
    return _status("VmRSS")


def peak_of(action: Callable[[], object]) -> int:
    """The most bytes that this process held during an action, with what it held before."""
    resident()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # ru_maxrss would remember earlier and the parent's peaks
    action()
    synchronize()
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def _status(key: str) -> int:
    """A size of this process in bytes; /proc gives KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])


def run_ranks(function: Callable[..., Any], workers: int, *arguments: Any, fresh: bool = False) -> Any:
    """Rank 0's result of `function`, run by gloo ranks on the CPU or by this process on its GPU.

    Ranks are forked from a process that has imported everything and run nothing; where memory is what is measured,
    `fresh` ones share nothing with another process.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "result.json"
        if torch.cuda.is_available():
            _rank(0, 1, folder, function, arguments)
        else:
            method = "spawn" if fresh else "forkserver"
            mp.start_processes(_rank, (workers, folder, function, arguments), nprocs=workers, start_method=method)
        return json.loads(out.read_text())


def _rank(rank: int, world: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ["LOCAL_RANK"] = str(rank)
    if device().type == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // world))
        store = dist.FileStore(f"{folder}/store", world)
        dist.init_process_group("gloo", rank=rank, world_size=world, store=store)
    init_mesh()
    result = function(*arguments)
    if rank == 0:
        (Path(folder) / "result.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
    if world > 1:
        # Gloo's threads may still hold tensors, and abort the process where the interpreter winds down under them.
        os._exit(0)


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def versions() -> dict[str, str]:
    """Of what decides the figures."""
    return {"ray_dwm": __version__, **{p: version(p) for p in ("torch", "ray", "transformers", "pyarrow", "numpy")}}


def where() -> str:
    """What the figures were measured on."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores"


def result_path(name: str, args: argparse.Namespace) -> Path:
    """The file of a benchmark's figures."""
    return Path(args.output) / f"{name}-{'gpu' if torch.cuda.is_available() else 'cpu'}-{args.preset}.json"


def write_result(name: str, args: argparse.Namespace, config: RunConfig, result: dict[str, Any]) -> Path:
    """One JSON file with the figures, the configuration and the versions."""
    options = {key: value for key, value in vars(args).items() if key != "output"}
    sections = {k: v for k, v in to_dict(config).items() if k in ("lm", "train", "dwm", "bilevel")}
    content = {"benchmark": name, "device": where(), "python": platform.python_version(), "versions": versions()}
    args.output.mkdir(parents=True, exist_ok=True)
    path = result_path(name, args)
    path.write_text(json.dumps({**content, "options": options, "result": result, "config": sections}, indent=2) + "\n")
    return path
