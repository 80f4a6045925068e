"""The layout that trains a configured run in the fewest GPU-hours among those that fit."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

from ray_dwm.config import ParallelConfig, RunConfig
from ray_dwm.core.activations import Checkpointing
from ray_dwm.core.costs import Speed
from ray_dwm.core.hardware import GPUS, gpu
from ray_dwm.errors import ConfigError, ResourceError
from ray_dwm.planning.estimate import Estimate, estimate, held, rooms
from ray_dwm.planning.inputs import Job

CHUNKS = (0, 32768, 8192, 2048)
"""Of parallel.loss_chunk that are tried, in tokens."""
CHECKPOINTING: tuple[Checkpointing, ...] = ("none", "selective", "full")
ALIKE = 0.005
"""Step times that differ by less count as the same."""
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Found:
    """What a search has seen."""

    best: Estimate | None
    """The fastest that fits; among those alike, the one with the fewest micro-batches, then the least memory."""
    leanest: Estimate
    """The one that lacks the least memory."""


def divisors(number: int) -> list[int]:
    """Of a positive number, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def search(job: Job, speed: Speed) -> Found:
    """Try every layout; with parameters in the host's memory only where nothing else fits and no DWM is learnt."""
    own = [job] if job.config.parallel.cpu_offload else []  # which is tried whatever else fits
    tried = [estimate(candidate, speed) for candidate in (*map(plain, own), *candidates(job, offload=False))]
    if not any(x.fits for x in tried) and not job.config.learns_dwm:
        tried += [estimate(candidate, speed) for candidate in candidates(job, offload=True)]
    leanest = min(tried, key=lambda x: (x.lacks, x.needed))
    fitting = [x for x in tried if x.fits]
    if not fitting:
        return Found(None, leanest)
    fastest = min(x.step_seconds for x in fitting)
    alike = [x for x in fitting if x.step_seconds <= (1 + ALIKE) * fastest]
    return Found(min(alike, key=lambda x: (x.job.micro_batches, x.needed)), leanest)


def feasible(job: Job, speed: Speed) -> Job | None:
    """A layout that fits, as `search` would find one, from memory alone.

    Only the smallest micro-batches and the largest are looked at: memory grows with them, but before a single one's
    backward there are no gradients yet.
    """
    for offload in (False, True)[: 1 if job.config.learns_dwm else 2]:
        for x in candidates(job, offload):
            extreme = x.config.train.micro_batch in (1, job.local_batch)
            if extreme and min(rooms(speed, *held(x, speed))) >= 0:
                return x
    return None


def candidates(job: Job, offload: bool) -> Iterator[Job]:
    """The run as it is configured, if that has its parameters there, and in every other layout that is worth trying."""
    config, own = job.config, plain(job)
    if own.config.parallel.cpu_offload == offload:
        yield own
    for shard, checkpointing, reshard, micro, chunk in itertools.product(*_axes(job)):
        # Without shards there is nothing to reshard, and a chunk that is no smaller than a micro-batch is none.
        if (shard == 1 and not reshard) or chunk >= micro * job.seq_len:
            continue
        parallel = dataclasses.replace(
            config.parallel,
            shard=shard,
            activation_checkpointing=checkpointing,
            reshard_after_forward=reshard,
            loss_chunk=chunk,
            cpu_offload=offload,
        )
        other = _laid_out(job, parallel, micro)
        if other != own:
            yield other


def _axes(
    job: Job,
) -> tuple[list[int], tuple[Checkpointing, ...], tuple[bool, ...], list[int], tuple[int, ...]]:
    """What is tried of each key; of micro-batches of as many parts, the one with the most even parts."""
    share = job.local_batch
    shards = [0, 1] if job.config.cluster.elastic else divisors(job.workers)
    return shards, CHECKPOINTING, (True, False), sorted({-(-share // n) for n in range(1, share + 1)}), CHUNKS


def plain(job: Job) -> Job:
    """The same layout in the words of the search: numbers for what is configured by 0, nothing that has no effect."""
    parallel, micro = job.config.parallel, min(job.config.train.micro_batch, job.local_batch)
    chunk = parallel.loss_chunk if parallel.loss_chunk < micro * job.seq_len else 0
    shard = parallel.shard if job.config.cluster.elastic else job.layout.shard
    return _laid_out(job, dataclasses.replace(parallel, shard=shard, loss_chunk=chunk), micro)


def _laid_out(job: Job, parallel: ParallelConfig, micro: int) -> Job:
    train = dataclasses.replace(job.config.train, micro_batch=micro)
    return dataclasses.replace(job, config=dataclasses.replace(job.config, parallel=parallel, train=train))


def overrides(found: Estimate) -> str:
    """A layout as overrides for the command line; an elastic group stays elastic."""
    config = found.job.config
    parallel, workers = config.parallel, config.cluster.workers
    words = {
        "parallel.shard": parallel.shard,
        "parallel.activation_checkpointing": parallel.activation_checkpointing,
        "parallel.reshard_after_forward": str(parallel.reshard_after_forward).lower(),
        "parallel.loss_chunk": parallel.loss_chunk,
        "train.micro_batch": config.train.micro_batch,
        **({"parallel.cpu_offload": "true"} if parallel.cpu_offload else {}),
        "cluster.workers": workers if isinstance(workers, int) else ",".join(map(str, workers)),
        "cluster.gpus_per_worker": 1,
    }
    return " ".join(f"{key}={value}" for key, value in words.items())


def with_workers(config: RunConfig, workers: int) -> RunConfig:
    """The run on so many GPUs, one for each worker.

    Raises:
        ConfigError: the configuration does not fit them.
    """
    cluster = dataclasses.replace(config.cluster, workers=workers, gpus_per_worker=1.0)
    return dataclasses.replace(config, cluster=cluster)


def nothing_fits(job: Job, speed: Speed, name: str, found: Found) -> ResourceError:
    """One line: what lacks, and what would help; every remedy has been tried."""
    lean = found.leanest
    helps = []
    for times in (2, 4, 8, 16):
        try:
            more = dataclasses.replace(job, config=with_workers(_whole(job.config), job.workers * times))
        except ConfigError:
            break
        if feasible(more, speed) is not None:
            helps.append(f"{more.workers} GPUs")
            break
    # Kinds of one nominal size report a little more or less.
    larger = sorted((g for g in GPUS if gpu(g).memory > 1.05 * speed.gpu.memory), key=lambda g: gpu(g).memory)
    for other in larger:
        if feasible(job, dataclasses.replace(speed, gpu=gpu(other))) is not None:
            helps.append(f"--gpu {other}")
            break
    half = dataclasses.replace(job, seq_len=job.seq_len // 2)
    if job.seq_len >= 4 and feasible(half, speed) is not None:
        helps.append(f"lm.seq_len={half.seq_len} (with half the tokens)")
    if job.config.learns_dwm:
        helps += _without_upper(job, speed)
    remedy = f"these would do: {', '.join(helps)}" if helps else "it needs more GPUs and larger ones, or a smaller LM"
    layout = overrides(lean).split(" cluster.")[0]
    return ResourceError(
        f"{job.config.lm.preset} does not fit {job.workers} {name}: the leanest layout ({layout}) needs "
        f"{shortfall(lean)}; {remedy}"
    )


def shortfall(x: Estimate) -> str:
    """What a layout that does not fit needs, and how much of it lacks."""
    if x.room < 0:
        return f"{x.needed / GIB:.1f} GiB on each GPU, {-x.room / GIB:.1f} GiB more than it has to spare"
    return (
        f"{x.host / GIB:.1f} GiB of each node's memory, {-x.host_room / GIB:.1f} GiB more than it has to spare "
        "(--host-memory-gb says what it has)"
    )


def _whole(config: RunConfig) -> RunConfig:
    """With the LM sharded over all workers, so that their number may change."""
    return dataclasses.replace(config, parallel=dataclasses.replace(config.parallel, shard=0))


def _without_upper(job: Job, speed: Speed) -> list[str]:
    """What the upper level could do without."""
    found = []
    config, bilevel = job.config, job.config.bilevel
    if bilevel.fidelity_every:
        unchecked = dataclasses.replace(config, bilevel=dataclasses.replace(bilevel, fidelity_every=0))
        if feasible(dataclasses.replace(job, config=unchecked), speed) is not None:
            found.append("bilevel.fidelity_every=0")
    uniform = dataclasses.replace(config, weighting=dataclasses.replace(config.weighting, method="uniform"))
    fits = feasible(dataclasses.replace(job, config=uniform), speed)
    if fits is not None:
        offloaded = " with parallel.cpu_offload=true" if fits.config.parallel.cpu_offload else ""
        found.append(f"weighting.method=uniform{offloaded}")
    return found
