"""A run planned: as it is configured, and in the cheapest layout that fits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ray_dwm.config import RunConfig, load
from ray_dwm.core.costs import Speed
from ray_dwm.core.hardware import gpu
from ray_dwm.core.traffic import Traffic
from ray_dwm.errors import ConfigError
from ray_dwm.planning.estimate import Estimate, estimate
from ray_dwm.planning.inputs import Job, job
from ray_dwm.planning.search import nothing_fits, plain, search
from ray_dwm.planning.utilisation import default_mfu


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What `ray-dwm plan` says."""

    gpu: str
    mfu_source: str
    price: float
    """Of a GPU-hour; 0: not said."""
    configured: Estimate | None
    """None where the configured layout is impossible on so many GPUs."""
    best: Estimate
    notes: tuple[str, ...] = ()
    """What is easily overlooked."""

    @property
    def best_is_configured(self) -> bool:
        """Whether no other layout is worth a change."""
        return self.configured is not None and plain(self.configured.job) == self.best.job


def on_gpus(files: Sequence[str | Path], overrides: Sequence[str], gpus: int = 0) -> tuple[RunConfig, str]:
    """(the configuration on so many GPUs, why its own layout is impossible on them; empty: it is possible).

    Args:
        gpus: one for each worker; 0: as many as cluster.workers says.

    Raises:
        ConfigError: the configuration is wrong for any layout.
    """
    own = [*overrides, "cluster.gpus_per_worker=1"]
    if not gpus:
        return load(files, own), ""
    own.append(f"cluster.workers={gpus}")
    try:
        return load(files, own), ""
    except ConfigError as refused:
        # Only a mesh that does not divide the GPUs is mended by sharding over all of them.
        try:
            return load(files, [*own, "parallel.shard=0"]), str(refused)
        except ConfigError:
            raise refused from None


def plan(
    config: RunConfig,
    name: str,
    *,
    mfu: float = 0.0,
    price: float = 0.0,
    vocab: int = 0,
    network_gbps: float = 0.0,
    host_memory_gb: float = 0.0,
    refused: str = "",
) -> Plan:
    """Plan a run on one GPU for each worker.

    Args:
        name: of the kind of GPU.
        mfu: 0: a published one.
        vocab: where there is no manifest; 0: the usual one.
        network_gbps: Gb/s to other nodes for each GPU; 0: that of the vendor's own systems.
        host_memory_gb: GB of a node's host; 0: those of the vendor's own systems.
        refused: why the configured layout is impossible; empty: it is possible.

    Raises:
        ConfigError: the GPU or the preset is not known.
        ResourceError: no layout fits; it says what would.
    """
    kind, name = gpu(name), name.lower()
    if network_gbps:
        kind = dataclasses.replace(kind, network=network_gbps * 1e9 / 8)
    if host_memory_gb:
        kind = dataclasses.replace(kind, host_memory=host_memory_gb * 1e9)
    wanted = job(dataclasses.replace(config, cluster=dataclasses.replace(config.cluster, gpus_per_worker=1.0)), vocab)
    bf16 = config.train.precision == "bf16"
    assumed, source = default_mfu(name, wanted.llama, config.parallel.compile, bf16)
    speed = Speed(gpu=kind, bf16=bf16, mfu=mfu or assumed)
    found = search(wanted, speed)
    if found.best is None:
        raise nothing_fits(wanted, speed, name, found)
    return Plan(
        gpu=name,
        mfu_source="as given" if mfu else source,
        price=price,
        configured=None if refused else estimate(wanted, speed),
        best=found.best,
        notes=(*wanted.notes, *_notes(wanted, refused)),
    )


def as_configured(config: RunConfig, name: str) -> Estimate:
    """A run on one GPU for each worker as it is configured, whether it fits or not; with a published MFU.

    Raises:
        ConfigError: the GPU or the preset is not known.
    """
    wanted, bf16 = job(config), config.train.precision == "bf16"
    mfu, _ = default_mfu(name.lower(), wanted.llama, config.parallel.compile, bf16)
    return estimate(wanted, Speed(gpu=gpu(name), bf16=bf16, mfu=mfu))


def _notes(wanted: Job, refused: str) -> list[str]:
    """What is easily overlooked of this run on these GPUs."""
    found, cluster, compiled = [], wanted.config.cluster, wanted.config.parallel.compile
    if refused:
        found.append(f"the configured layout is impossible: {refused}")
    if cluster.elastic:
        least = cluster.least_workers
        found.append(
            f"cluster.workers is elastic: time is that of {wanted.workers} workers, memory is enough for {least}"
        )
    if compiled:
        found.append("activations are those of uncompiled blocks: compiled ones keep less")
    return found


def predicted_traffic(config: RunConfig) -> Traffic:
    """Bytes that each rank of a configured run sends in a mean step, by kind; by gloo where workers have no GPU.

    all-gather and reduce-scatter: FSDP2's, and the upper level's gathers of u; all-reduce: gradients over the copies of
    the LM; bases: those of the sketches, within a copy; DWM: encodings, statistics, token ids and alignments. Sums of
    single numbers (counted tokens, norms) are left out. At one rank all are 0. A GPU is named because an estimate needs
    one; none matters here, but where a budget chooses N (bilevel.every=0).
    """
    return estimate(job(config), Speed(gpu=gpu("h100"), bf16=config.train.precision == "bf16", mfu=0.4)).traffic
