"""Time of a training step and of what the upper level adds, by counting FLOPs and bytes.

A step's compute is its model FLOPs over `mfu` * peak, where `mfu` is what the kernels reach with nothing computed twice
and all communication hidden. On top of it comes what activation checkpointing and a chunked loss compute again, and the
communication that no compute hides.
"""

from __future__ import annotations

from dataclasses import dataclass

from ray_dwm.core import activations as act
from ray_dwm.core.accounting import Llama
from ray_dwm.core.activations import FP32
from ray_dwm.core.hardware import Gpu
from ray_dwm.core.links import HOST, Links
from ray_dwm.core.memory import Layout
from ray_dwm.core.traffic import gather
from ray_dwm.core.upper_memory import Upper, matrices

DIRECTION_PASSES = 45
"""Reads and writes of a rank's shard that u = C^T (D * v) takes, counted in core/hypergradient.py's operators."""
SKETCH_FP32 = 0.5
"""Part of the fp32 peak that a sketch's products with the momentum reach; assumed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Speed:
    """What a rank computes with."""

    gpu: Gpu
    bf16: bool
    mfu: float

    @property
    def flops(self) -> float:
        """Model FLOP/s that are reached."""
        return self.mfu * self.peak

    @property
    def peak(self) -> float:
        """FLOP/s of the compute dtype."""
        return self.gpu.peak(self.bf16)


@dataclass(frozen=True, slots=True)
class StepTime:
    """Seconds of so many passes through the LM."""

    compute: float
    """Model FLOPs."""
    again: float
    """What is computed a second time."""
    communication: float
    """At the links' rates."""
    exposed: float
    """The part of it that nothing hides."""
    transfer: float = 0.0
    """To and from the host, where the optimizer is there."""

    @property
    def total(self) -> float:
        """Compute and what it does not hide."""
        return self.compute + self.again + self.exposed + self.transfer


def micro_batches(sequences: int, size: int) -> list[tuple[int, int]]:
    """(number, sequences) of micro-batches of at most `size`: the last one may be smaller."""
    full, rest = divmod(sequences, size)
    return [part for part in ((full, size), (1, rest)) if part[0] * part[1]]


def forward_flops(llama: Llama, seq_len: int) -> float:
    """Of a forward, per token: a third of a training step's."""
    return llama.flops_per_token(seq_len) / 3


def again_seconds(llama: Llama, layout: Layout, speed: Speed, tokens: float, seq_len: int) -> float:
    """What the backward computes again for so many tokens, a micro-batch.

    full: the blocks' forward. selective: what is not kept, by the memory's bandwidth, written once and read once more.
    A chunked loss: the head's product.
    """
    seconds = 0.0
    head = 2 * llama.vocab * llama.width
    if layout.checkpointing == "full":
        seconds += tokens * (forward_flops(llama, seq_len) - head) / speed.flops
    elif layout.checkpointing == "selective":
        again = act.recomputed(llama, layout.compute, "selective")
        seconds += tokens * llama.layers * 2 * again / speed.gpu.bandwidth
    if 0 < layout.loss_chunk < tokens:  # a chunk that holds the whole micro-batch is computed once
        seconds += tokens * head / speed.flops
    return seconds


def pass_time(
    llama: Llama, layout: Layout, copies: int, speed: Speed, passes: int, tokens: float, seq_len: int
) -> StepTime:
    """Of forward and backward of so many micro-batches of `tokens` tokens each on every rank.

    A block has collectives of its own, and so has the root. Blocks' gathers hide behind the forward; gathers and
    reductions, which share the link, behind the backward. The first gathers and the root's reduction have nothing to
    hide behind.
    """
    links = Links.of(speed.gpu, layout, copies)
    compute = tokens * llama.flops_per_token(seq_len) / speed.flops
    again = again_seconds(llama, layout, speed, tokens, seq_len)
    block, root = llama.block_parameters, llama.root_parameters
    first = gather_seconds(layout, links, root) + gather_seconds(layout, links, block)
    forward = (llama.layers - 1) * gather_seconds(layout, links, block)
    backward = llama.layers * reduction_seconds(layout, copies, links, block)
    if layout.reshard:
        backward += llama.layers * gather_seconds(layout, links, block)
    last = reduction_seconds(layout, copies, links, root)
    exposed = first + last + max(0.0, forward - compute / 3) + max(0.0, backward - (2 / 3 * compute + again))
    sent = first + forward + backward + last
    return StepTime(passes * compute, passes * again, passes * sent, passes * exposed)


def passes_time(
    llama: Llama, layout: Layout, copies: int, speed: Speed, parts: list[tuple[int, int]], seq_len: int
) -> StepTime:
    """`pass_time` of (number, sequences) of micro-batches of several sizes, together."""
    times = [pass_time(llama, layout, copies, speed, number, size * seq_len, seq_len) for number, size in parts]
    names = ("compute", "again", "communication", "exposed")
    return StepTime(*(sum(getattr(time, name) for time in times) for name in names))


def forward_seconds(
    llama: Llama, layout: Layout, copies: int, speed: Speed, passes: float, tokens: float, seq_len: int
) -> float:
    """Of so many forwards without a backward, of `tokens` tokens of a rank together, with what they do not hide."""
    links = Links.of(speed.gpu, layout, copies)
    block, root = (gather_seconds(layout, links, x) for x in (llama.block_parameters, llama.root_parameters))
    compute = tokens * forward_flops(llama, seq_len) / speed.flops
    gathers = llama.layers * (passes if layout.reshard else 1) - 1
    return compute + root + block + max(0.0, gathers * block - compute)


def gather_seconds(layout: Layout, links: Links, parameters: int) -> float:
    """To gather so many parameters over the ranks of a copy."""
    return gather(layout.compute * parameters, layout.shard) / links.shard + links.shard_latency


def reduction_seconds(layout: Layout, copies: int, links: Links, parameters: int) -> float:
    """To scatter the sums of so many gradients over the ranks of a copy, and to sum each part over the copies."""
    within = gather(FP32 * parameters, layout.shard) / links.shard + links.shard_latency
    between = gather(FP32 * parameters / layout.shard, copies) / links.copies + links.copies_latency
    return within + 2 * between


def offload_seconds(llama: Llama, layout: Layout, speed: Speed, passes: int) -> float:
    """Shards to the GPU for every gather, gradients to the host, and the optimizer there.

    The host's update reads parameters, gradients and moments, and writes all but the gradients; its memory is taken to
    be as fast for a GPU's part as the bus to it.
    """
    if not layout.offload:
        return 0.0
    parameters = llama.parameters / layout.shard
    moved = FP32 * parameters * passes * (2 if layout.reshard else 1) + FP32 * parameters * passes
    updated = FP32 * parameters * (3 + 2 * layout.moments)
    return (moved + updated) / (HOST * speed.gpu.host)


def estimator_seconds(
    llama: Llama, layout: Layout, speed: Speed, upper: Upper, tokens: float, seq_len: int
) -> dict[str, float]:
    """Direction and contraction of a bi-level step on one rank, without communication.

    Args:
        tokens: of the contracted sequences.
    """
    forward = tokens * forward_flops(llama, seq_len) / speed.flops
    shard = FP32 * llama.parameters / layout.shard
    direction = DIRECTION_PASSES * shard / speed.gpu.bandwidth
    if upper.estimator == "ghost_lowrank":
        both = [(o, i, min(upper.rank, i)) for o, i in matrices(llama)]
        products = tokens * sum(2 * r * (o + i) + 2 * r * r for o, i, r in both)
        read = tokens * layout.compute * sum(o + i for o, i, _ in both)
        momentum = sum(8 * o * i * r for o, i, r in both) / layout.shard  # four products: a power iteration and a half
        core = sum(2 * o * i * r for o, i, r in both) / layout.shard
        watch = max(products / speed.flops, read / speed.gpu.bandwidth)
        watch += (momentum + core) / (SKETCH_FP32 * speed.gpu.fp32)
        return {"direction": direction, "contraction": watch}
    forwards = {"one_sided": 1.0, "central": 2.0, "ghost": 1.0, "jvp": 3.0}
    # exact: a backward for every sequence, each as long as that of all of them.
    count = forwards.get(upper.estimator, 2.0 * upper.contracted)
    writes = {"one_sided": 5, "central": 8}.get(upper.estimator, 0) * shard / speed.gpu.bandwidth
    return {"direction": direction, "contraction": count * forward + writes}


def dwm_forward_seconds(width: int, layers: int, speed: Speed, tokens: float) -> float:
    """The DWM's encoder over a rank's sequences, in fp32: bound by its memory traffic or by its products.

    A layer multiplies 8 D^2 numbers a token (an MLP twice as wide) and reads or writes about 20 D: two norms, a
    convolution with its transposes, the MLP's three tensors, two sums.
    """
    products = tokens * layers * 8 * width * width / (SKETCH_FP32 * speed.gpu.fp32)
    return max(products, tokens * layers * 20 * width * FP32 / speed.gpu.bandwidth)
