"""Bytes/s at which a rank sends: by the slowest link that any of the rings crosses which run at the same time.

Ranks fill one node after the other, and a copy of the LM lies on neighbours by rank (engine/mesh.py). A collective's
rings all run at once and wait for each other, so the slowest is what counts. A ring within a node has its links. One
that leaves a node shares that node's network with the others, to which each of its ranks there brings its part: what
counts is where it has the fewest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ray_dwm.core.hardware import Gpu
from ray_dwm.core.memory import Layout

NVLINK = 0.8
"""Part of NVLink's rate that a ring reaches with large tensors. NCCL's own model (src/graph/topo.h, 2.30) has 20 of 25
GB/s for a link of an A100, 20.6 of 25 on Hopper, 40.1 of 50 on Blackwell; measured between two H100s: 370 to 380 of 450
(NCCL issue 1264)."""
PCIE = 0.4
"""Of PCIe's rate, for a ring over all cards of a node, part of which goes through the hosts' memory or from socket to
socket. Ours, after one report: eight RTX 5090s on PCIe 5 reach 28 of 64 GB/s, four of them 35 (NCCL issue 1639).
Boards differ: with switches and peer access it is more, without them less."""
NETWORK = 0.8
"""Of the network's rate; assumed (NCCL's model has 12 of 12.5 GB/s for 100 Gb/s, which no shared network keeps up)."""
HOST = 0.5
"""Of PCIe's rate between a GPU and its host's memory while all GPUs of a node copy. Ours: NCCL's model has 12 of 16
GB/s for a single PCIe 3 x16, and 16 V100s of a DGX-2 that copied at once had a quarter of that (DeepSpeed issue 1137);
newer nodes have fewer GPUs behind each switch."""

BASE, HOP_NVLINK, HOP_PCIE, HOP_NETWORK = 8.4e-6, 3.4e-6, 5.7e-6, 14e-6
"""Seconds of a ring that carries nothing: once, for each rank within a node, for each node (NCCL's own model, `Simple`
protocol, src/graph/tuning.cc)."""


def bus(gpu: Gpu, rings: Iterable[Sequence[int]]) -> float:
    """Bytes/s of the slowest of some rings of ranks that run at the same time."""
    near = (NVLINK if gpu.nvlink else PCIE) * gpu.link
    slowest = near
    for ring in rings:
        at = Counter(rank // gpu.per_node for rank in ring)
        if len(at) > 1:
            slowest = min(slowest, NETWORK * gpu.network * min(at.values()))
    return slowest


def latency(gpu: Gpu, rings: Iterable[Sequence[int]]) -> float:
    """Seconds that the slowest of some rings takes with nothing to send; 0 where there is nobody to send to."""
    hop, longest = HOP_NVLINK if gpu.nvlink else HOP_PCIE, 0.0
    for ring in rings:
        nodes = len({rank // gpu.per_node for rank in ring})
        if len(ring) > 1:
            longest = max(longest, BASE + (len(ring) - nodes) * hop + (nodes - 1) * HOP_NETWORK)
    return longest


@dataclass(frozen=True, slots=True)
class Links:
    """Bytes/s within a copy of the LM, between the copies, and over all ranks; seconds before a first byte arrives."""

    shard: float
    copies: float
    all: float
    shard_latency: float
    copies_latency: float
    all_latency: float

    @staticmethod
    def of(gpu: Gpu, layout: Layout, copies: int) -> Links:
        """Those of a layout."""
        return _links(gpu, layout.shard, copies)

    def seconds(self, traffic: dict[str, float]) -> dict[str, float]:
        """Kind -> time at the link's rate."""
        rates = {
            "all-gather": self.shard,
            "reduce-scatter": self.shard,
            "all-reduce": self.copies,
            "bases": self.shard,
            "DWM": self.all,
        }
        return {kind: sent / rates[kind] for kind, sent in traffic.items()}


@lru_cache(maxsize=256)
def _links(gpu: Gpu, shard: int, copies: int) -> Links:
    within = [range(first, first + shard) for first in range(0, shard * copies, shard)]
    between = [range(first, shard * copies, shard) for first in range(shard)]
    every = [range(shard * copies)]
    kinds = within, between, every
    return Links(*(bus(gpu, rings) for rings in kinds), *(latency(gpu, rings) for rings in kinds))
