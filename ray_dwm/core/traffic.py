"""Bytes that a rank sends in a step, by kind, and the bandwidth they meet.

A ring of n ranks sends (n - 1) / n of a tensor from each of them to gather or to scatter it, and twice that to sum it
everywhere (Thakur, Rabenseifner and Gropp 2005). NCCL and gloo do so for large tensors, but torch's gloo sums where it
should scatter (`ProcessGroupGloo.cpp`), which is twice as much. In a micro-batch FSDP2 gathers the root once and every
block once or, where it reshards, twice, in the compute dtype; it scatters gradients in fp32 after every one, and with
several copies of the LM (HSDP) sums the shards' gradients over the copies.
Legend: S = ranks that share a copy, R = copies, e = bytes of a number in the compute dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

from ray_dwm.core.accounting import Llama
from ray_dwm.core.activations import FP32
from ray_dwm.core.hardware import Gpu
from ray_dwm.core.memory import Layout
from ray_dwm.core.upper_memory import FINITE_DIFFERENCES, Upper, matrices

EFFICIENCY = 0.8
"""Part of a link's rate that a ring reaches with large tensors: on NVLink 4, 370 to 380 of 450 GB/s between two GPUs
(NVIDIA nccl issue 1264) and little less in a ring of eight. Assumed for all links."""
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "DWM")
"""all-reduce: of the gradients over the copies of the LM, and of the upper level's bases."""

Traffic = dict[str, float]
"""Kind -> bytes that a rank sends."""


def gather(total: float, ranks: int) -> float:
    """Bytes that a rank sends so that all have `total` bytes, of which each holds a part; as many to reduce-scatter."""
    return total * (ranks - 1) / ranks


def lm_traffic(llama: Llama, layout: Layout, copies: int, passes: float, backward: bool = True) -> Traffic:
    """Of so many passes through the LM.

    Args:
        copies: R.
        passes: micro-batches.
        backward: whether they have one; else nothing is reduced, and what does not reshard is gathered once for all.
    """
    blocks, root = llama.layers * llama.block_parameters, llama.root_parameters
    if backward:
        whole = passes * (blocks * (2 if layout.reshard else 1) + root)
    else:
        whole = (passes * blocks if layout.reshard else blocks) + root
    scattered = FP32 * llama.parameters * passes if backward else 0
    return {
        "all-gather": gather(layout.compute * whole, layout.shard),
        "reduce-scatter": (2 if layout.gloo else 1) * gather(scattered, layout.shard),
        "all-reduce": 2 * gather(scattered / layout.shard, copies),
    }


def step_traffic(workers: int, batch: int, dwm_width: int) -> Traffic:
    """What every step with weights sends: encodings of D + 1 numbers, and id, domain and loss of every sequence."""
    return {"DWM": gather(batch * (FP32 * (dwm_width + 1) + 2 * 8 + FP32), workers)}


def upper_traffic(
    llama: Llama, layout: Layout, copies: int, upper: Upper, target_passes: int, passes: int, seq_len: int, batch: int
) -> Traffic:
    """What a bi-level step sends more.

    Args:
        target_passes: micro-batches of the target batches, over all sets.
        passes: micro-batches of what is contracted.
    """
    found = lm_traffic(llama, layout, copies, target_passes)
    s, workers = layout.shard, layout.shard * copies
    if upper.estimator in FINITE_DIFFERENCES:
        forwards = 1 if upper.estimator == "one_sided" else 2
        once = lm_traffic(llama, layout, copies, passes, backward=False)
        found = {kind: found[kind] + forwards * once[kind] for kind in found}
    elif upper.estimator == "ghost":
        found["all-gather"] += gather(layout.compute * llama.parameters * passes, s)
    elif upper.estimator == "ghost_lowrank":
        ranks = [(o, i, min(upper.rank, i)) for o, i in matrices(llama)]
        # Right directions twice, left ones once, Gram matrices in double twice, and the cores of u.
        numbers = sum(FP32 * (2 * i + o + r) * r + 2 * 8 * r * r for o, i, r in ranks)
        found["all-reduce"] += 2 * gather(numbers, s)
        found["all-gather"] += gather(2 * FP32 * llama.vocab * llama.width, s)  # u of embedding and head
    else:
        found["all-gather"] += gather(2 * FP32 * llama.parameters, s)
    found["DWM"] = gather(batch * (8 * seq_len + FP32 + 8), workers)  # token ids, alignments, their places
    return found


def bus(gpu: Gpu, ranks: int, per_node: int) -> float:
    """Bytes/s at which a rank sends in a ring of so many ranks, of which so many are in each node.

    Every rank of a node brings its part of the node's network, and all of them share it ring by ring.
    """
    rate = gpu.link if ranks <= per_node else min(gpu.link, per_node * gpu.network)
    return EFFICIENCY * rate


BASE, HOP_LINK, HOP_NETWORK = 8.4e-6, 3.4e-6, 14e-6
"""Seconds of a ring that carries nothing: once, for each rank within a node, for each node (NCCL's own model, `Simple`
protocol on NVLink and InfiniBand, src/graph/tuning.cc)."""


def latency(ranks: int, per_node: int) -> float:
    """Seconds that a ring of so many ranks takes with nothing to send; 0 where there is nobody to send to."""
    nodes = -(-ranks // per_node)
    return BASE + (ranks - nodes) * HOP_LINK + (nodes - 1) * HOP_NETWORK if ranks > 1 else 0.0


@dataclass(frozen=True, slots=True)
class Links:
    """Bytes/s within a copy of the LM, between the copies, and over all ranks; seconds before a first byte arrives."""

    shard: float
    copies: float
    all: float
    shard_latency: float
    copies_latency: float

    @staticmethod
    def of(gpu: Gpu, layout: Layout, copies: int) -> Links:
        """A copy lies on neighbours by rank, so nodes are filled with copies where S is small."""
        node, s = gpu.per_node, layout.shard
        near, far, every = min(s, node), max(1, node // s), min(s * copies, node)
        rates = bus(gpu, s, near), bus(gpu, copies, far), bus(gpu, s * copies, every)
        return Links(*rates, latency(s, near), latency(copies, far))

    def seconds(self, traffic: Traffic) -> dict[str, float]:
        """Kind -> time at the link's rate."""
        rates = {"all-gather": self.shard, "reduce-scatter": self.shard, "all-reduce": self.copies, "DWM": self.all}
        return {kind: sent / rates[kind] for kind, sent in traffic.items()}
