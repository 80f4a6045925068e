"""Bytes that a rank sends in a step, by kind.

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
from ray_dwm.core.memory import Layout
from ray_dwm.core.upper_memory import FINITE_DIFFERENCES, Upper, matrices

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "bases", "DWM")
"""all-reduce: of the gradients over the copies of the LM; bases: those of the sketches, summed within a copy; DWM: what
is known of sequences, over all ranks."""

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


def step_traffic(workers: int, rows: int, numbers: int) -> Traffic:
    """What every step with weights sends: fp32 numbers about each sequence, and its id, domain and loss for the record.

    Args:
        rows: sequences of the global batch, with what pads it.
        numbers: of each sequence: its encoding, statistics of the LM, or both.
    """
    return {"DWM": gather(rows * (FP32 * numbers + 2 * 8 + FP32), workers)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Passes:
    """Micro-batches of a rank in a bi-level step."""

    step: int
    """Of the LM's step."""
    chunks: int
    """Parts of a micro-batch for which the LM calls its head."""
    target: float
    """Of the target batches, over all sets, in the mean: a target gradient may serve several steps."""
    contracted: int
    """Of what is contracted."""


def upper_traffic(
    llama: Llama, layout: Layout, copies: int, upper: Upper, passes: Passes, seq_len: int, rows: int
) -> Traffic:
    """What a bi-level step sends more, without checks.

    Args:
        rows: sequences of the global batch, with what pads it.
    """
    found = lm_traffic(llama, layout, copies, passes.target)
    s, workers = layout.shard, layout.shard * copies
    if upper.estimator in FINITE_DIFFERENCES:
        forwards = 1 if upper.estimator == "one_sided" else 2
        once = lm_traffic(llama, layout, copies, passes.contracted, backward=False)
        found = {kind: found[kind] + forwards * once[kind] for kind in found}
    elif upper.estimator == "ghost":
        # Every module gathers its part of u whenever its backward runs: embedding and head also where they share it.
        table = llama.vocab * llama.width
        whole = llama.layers * llama.block_parameters + llama.width + table * (1 + passes.chunks)
        found["all-gather"] += gather(layout.compute * whole * passes.step, s)
    elif upper.estimator == "ghost_lowrank":
        ranks = [(o, i, min(upper.rank, i)) for o, i in matrices(llama)]
        # Right directions twice, left ones once, Gram matrices in double twice, and the cores of u.
        numbers = sum(FP32 * (2 * i + o + r) * r + 2 * 8 * r * r for o, i, r in ranks)
        found["bases"] = 2 * gather(numbers, s)
        found["all-gather"] += gather(2 * FP32 * llama.vocab * llama.width, s)  # u of embedding and head
    else:
        found["all-gather"] += gather(2 * FP32 * llama.parameters, s)
    # Token ids and statistics of all sequences; alignments and their places of those that are contracted.
    feedback = rows * (8 * seq_len + FP32 * upper.statistics) + upper.contracted * workers * (FP32 + 8)
    found["DWM"] = gather(feedback, workers)
    return found


def upper_collectives(llama: Llama, layout: Layout, upper: Upper, passes: Passes) -> int:
    """Rings within a copy that a bi-level step goes round beyond its target gradient; a sum everywhere counts twice."""
    parameters = 9 * llama.layers  # of the blocks: seven matrices and two norms each
    if upper.estimator in FINITE_DIFFERENCES:
        forwards = 1 if upper.estimator == "one_sided" else 2
        return forwards * (llama.layers * (passes.contracted if layout.reshard else 1) + 1)
    if upper.estimator == "ghost":
        return passes.step * (parameters + 2 + passes.chunks)
    return 2 + 2 * 6 if upper.estimator == "ghost_lowrank" else 2 * (parameters + 3)


def audit_traffic(llama: Llama, layout: Layout, copies: int, passes: Passes, judged: tuple[int, int]) -> Traffic:
    """What a check of fidelity and realised change sends more.

    Four forwards of the judge, the target loss twice, and the LM's step once more.

    Args:
        passes: those of the target are those that a whole target batch is.
        judged: sequences of a rank that the judge looks at, and the micro-batches they are.
    """
    forwards = [(4, judged[1]), (2, passes.target)]
    found = lm_traffic(llama, layout, copies, passes.step)
    for times, count in forwards:
        once = lm_traffic(llama, layout, copies, count, backward=False)
        found = {kind: found[kind] + times * once[kind] for kind in found}
    workers = layout.shard * copies
    found["DWM"] = 2 * gather(judged[0] * workers * (FP32 + 8), workers)
    return found


def added(*parts: tuple[float, Traffic]) -> Traffic:
    """Sum of traffics, each so many times."""
    found: Traffic = {}
    for times, traffic in parts:
        for kind, sent in traffic.items():
            found[kind] = found.get(kind, 0.0) + times * sent
    return found
