"""A run planned: as it is configured, and in the cheapest layout that fits."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from ray_dwm.config import RunConfig
from ray_dwm.core.costs import Speed
from ray_dwm.core.hardware import gpu
from ray_dwm.core.traffic import Traffic
from ray_dwm.planning.estimate import Estimate, estimate
from ray_dwm.planning.inputs import job
from ray_dwm.planning.search import nothing_fits, search, with_workers
from ray_dwm.planning.utilisation import default_mfu


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What `ray-dwm plan` says."""

    gpu: str
    mfu_source: str
    price: float
    """Of a GPU-hour; 0: not said."""
    configured: Estimate
    best: Estimate


def plan(
    config: RunConfig, name: str, *, mfu: float = 0.0, price: float = 0.0, vocab: int = 0, network_gbps: float = 0.0
) -> Plan:
    """Plan a run on one GPU for each worker.

    Args:
        name: of the kind of GPU.
        mfu: 0: a published one.
        vocab: where there is no manifest; 0: the usual one.
        network_gbps: Gb/s to other nodes for each GPU; 0: that of the vendor's own systems.

    Raises:
        ConfigError: the GPU or the preset is not known.
        ResourceError: no layout fits; it says what would.
    """
    kind = gpu(name)
    if network_gbps:
        kind = dataclasses.replace(kind, network=network_gbps * 1e9 / 8)
    wanted = job(with_workers(config, config.cluster.most_workers), vocab)  # of an elastic group, the most
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
        configured=estimate(wanted, speed),
        best=found.best,
    )


def predicted_traffic(config: RunConfig) -> Traffic:
    """Bytes that each rank of a configured run sends in a mean step, by kind; by gloo where workers have no GPU.

    all-gather and reduce-scatter: FSDP2's, and the upper level's gathers of u; all-reduce: gradients over the copies of
    the LM and the upper level's bases; DWM: encodings, token ids and alignments. Sums of single numbers (counted
    tokens, norms) are left out. At one rank all are 0. A GPU is named because an estimate needs one; none matters here.
    """
    return estimate(job(config), Speed(gpu=gpu("h100"), bf16=config.train.precision == "bf16", mfu=0.4)).traffic
