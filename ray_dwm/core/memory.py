"""A rank's memory through a training step, as a list of phases; the largest is its peak.

Parameters, gradients and optimizer are fp32 shards (FSDP2): 4, 4 and 8 (AdamW) bytes a parameter over the shards. What
FSDP2 adds, as its code has it (torch 2.13, `_fsdp_param_group.py`, `_fsdp_collectives.py`), e being the bytes of a
number in the compute dtype, p a block's and r the root's parameters (embedding, final norm, head):

| buffer | bytes | when |
|---|---|---|
| root, gathered | er | from its forward to the end of the backward: a root does not reshard |
| a block, gathered | ep | in its forward and its backward; all of them from the forward on without resharding |
| what the gather writes to | ep | the next block's in a block's backward and in the loss's; one rank: none |
| a block's gradients before they are reduced | ep | until their copy for the reduction is made |
| that copy, in fp32 | 4p | until the next block's is made |
| what a reduction makes of it | 4p / shards | it becomes the gradient, or is added to it |
| root's gradients, and their copy | er, 4r | the head's from the loss on; both at the end of the backward |

Parts of tensors that do not divide into equal shards are not rounded up. The optimizer is fused: it holds nothing more.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ray_dwm.core import activations as act
from ray_dwm.core.accounting import Llama
from ray_dwm.core.activations import FP32, Checkpointing

FRAMEWORK = 2 * 2**30
"""Bytes that a GPU process needs besides tensors, a round figure: CUDA context and kernels (about 0.5 GiB), NCCL's
buffers (about 1 GiB), workspaces of cuBLAS and cuDNN. Not measured here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How an LM lies on a rank."""

    compute: int
    """Bytes of a number in the compute dtype: 4 (fp32) or 2 (bf16)."""
    shard: int = 1
    """Ranks that share one copy."""
    reshard: bool = True
    checkpointing: Checkpointing = "none"
    loss_chunk: int = 0
    """Tokens of a micro-batch whose logits are there at a time; 0: all."""
    moments: int = 2
    """Numbers that the optimizer keeps for each parameter: 2 for AdamW, 1 for momentum, 0 for plain SGD."""
    offload: bool = False
    """Shards of parameters, gradients and optimizer are in the host's memory."""
    gloo: bool = False
    """Collectives are gloo's, which gathers by way of a copy, and scatters sums by summing a copy everywhere."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """What goes through the LM at a time."""

    sequences: int
    seq_len: int
    first: bool = False
    """Whether it is the only one: no gradients are there before its backward."""
    taps: bool = False
    """Whether the ghosts watch it, and keep every module's input."""

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return self.sequences * self.seq_len


PARTS = ("parameters", "gradients", "optimizer", "activations", "logits", "gathered", "reduction", "bilevel")
"""gathered: whole parameters; reduction: whole gradients and their copies; bilevel: what the upper level holds."""


@dataclass(frozen=True, slots=True)
class Phase:
    """A moment of a step."""

    name: str
    parts: dict[str, float] = field(default_factory=dict)
    """Part -> bytes."""

    @property
    def total(self) -> float:
        """Bytes."""
        return sum(self.parts.values())

    def plus(self, **parts: float) -> Phase:
        """With so many bytes more."""
        return Phase(self.name, {p: self.parts.get(p, 0) + parts.get(p, 0) for p in PARTS})

    def named(self, name: str) -> Phase:
        """Under another name."""
        return Phase(name, self.parts)


def peak(phases: list[Phase]) -> Phase:
    """The largest."""
    return max(phases, key=lambda phase: phase.total)


def shard_copy(llama: Llama, layout: Layout) -> float:
    """Bytes of one fp32 number for each parameter of a rank's shard."""
    return FP32 * llama.parameters / layout.shard


def resting(llama: Llama, layout: Layout, gradients: bool) -> Phase:
    """Between the passes through the LM."""
    copy = 0.0 if layout.offload else shard_copy(llama, layout)
    return Phase("rest").plus(parameters=copy, optimizer=layout.moments * copy, gradients=copy if gradients else 0)


def pass_phases(llama: Llama, layout: Layout, micro: MicroBatch) -> list[Phase]:
    """A micro-batch's forward and backward, where it can be at its largest."""
    return [
        *_loss_phases(llama, layout, micro),
        *_block_phases(llama, layout, micro),
        *_root_phases(llama, layout, micro),
    ]


def forward_phase(llama: Llama, layout: Layout, micro: MicroBatch) -> Phase:
    """A forward without a graph, beside what rests: three tensors of the MLP and three of the width, or the logits."""
    e, p = layout.compute, llama.block_parameters
    gathered = e * (llama.root_parameters + (p if layout.reshard else llama.layers * p))
    inside = micro.tokens * 3 * e * (llama.mlp_width + llama.width)
    loss = micro.tokens * e * llama.width + _held(layout, micro) * act.logits_forward(llama, e)
    ahead = e * p if layout.shard > 1 else 0
    return (
        resting(llama, layout, gradients=False)
        .named("forward")
        .plus(gathered=gathered + ahead, logits=max(inside, loss))
    )


def _loss_phases(llama: Llama, layout: Layout, micro: MicroBatch) -> list[Phase]:
    """Around the loss: every block has left what it keeps, the logits are there."""
    e, tokens, held = layout.compute, micro.tokens, _held(layout, micro)
    base = _in_pass(llama, layout, micro, done=0).plus(activations=tokens * act.tail_saved(llama, e))
    gather = e * llama.block_parameters if layout.shard > 1 else 0
    head = e * llama.vocab * llama.width
    # Of chunks, the gradients of the hidden states wait for the last one, and the head's are added one to the other.
    hidden = tokens * e * llama.width if held < tokens else 0
    earlier = head if held < tokens else 0
    forward = base.plus(logits=held * act.logits_forward(llama, e), gathered=gather)
    base = base.plus(gathered=gather if layout.reshard else 0)  # the last block's again, for its backward
    backward = base.plus(logits=held * act.logits_backward(llama), activations=hidden, reduction=earlier)
    after = base.plus(logits=held * act.head_backward(llama, e), activations=hidden, reduction=head + earlier)
    return [forward.named("loss, forward"), backward.named("loss, backward"), after.named("head, backward")]


def _block_phases(llama: Llama, layout: Layout, micro: MicroBatch) -> list[Phase]:
    """Backwards of the last block, the one before it and the first; in between, what is kept falls evenly."""
    e, p, d = layout.compute, llama.block_parameters, llama.width
    head = e * llama.vocab * d
    found = []
    for done in sorted({0, min(1, llama.layers - 1), llama.layers - 1}):
        base, name = _in_pass(llama, layout, micro, done), f"block {llama.layers - done}, backward"
        ahead = e * p if layout.shard > 1 and layout.reshard and done < llama.layers - 1 else 0
        again = act.block_again(llama, e, layout.checkpointing) + act.block_transient(llama, e)
        mlp = base.plus(
            activations=micro.tokens * again,
            gathered=ahead + (e * p if layout.reshard else 0),
            reduction=head + 3 * e * d * llama.mlp_width + (FP32 * p if done else 0),
        )
        reduction = base.plus(
            activations=micro.tokens * (e * d - _kept(llama, layout, micro)),
            gathered=ahead - (0 if layout.reshard else e * p),
            reduction=head + _reduction(layout, p),
        )
        found += [mlp.named(name), reduction.named(f"{name}, reduction")]
        if layout.gloo and ahead:
            gathers = base.plus(gathered=3 * e * p, reduction=head + (FP32 * p if done else 0))
            found.append(gathers.named(f"{name}, gather"))
    return found


def _root_phases(llama: Llama, layout: Layout, micro: MicroBatch) -> list[Phase]:
    """The end of the backward: gradients of embedding, final norm and head are whole, then reduced."""
    e, r, states = layout.compute, llama.root_parameters, micro.tokens * layout.compute * llama.width
    base = _in_pass(llama, layout, micro, done=llama.layers)
    # The gradient of a shared embedding comes from the head and from the look-up, and their sum is a third one.
    parts = 2 * e * llama.vocab * llama.width if llama.tied else 0
    whole = base.plus(activations=states, reduction=e * r + parts + FP32 * llama.block_parameters)
    # torch's loop over the gradients leaves its variable behind, which holds the last one: the head's.
    last = e * llama.vocab * llama.width if layout.shard > 1 and not llama.tied else 0
    reduction = base.plus(gathered=-e * r, reduction=_reduction(layout, r, last))
    return [whole.named("embedding, backward"), reduction.named("root, reduction")]


def _reduction(layout: Layout, parameters: int, left: int = 0) -> float:
    """The gradients' fp32 copy, and beside it first the gradients themselves, then what is `left` and what is made."""
    summed = FP32 * parameters if layout.gloo and layout.shard > 1 else 0
    return FP32 * parameters + max(layout.compute * parameters, left + FP32 * parameters / layout.shard + summed)


def _in_pass(llama: Llama, layout: Layout, micro: MicroBatch, done: int) -> Phase:
    """With the backwards of so many blocks done; what the running block adds is not in it."""
    e, p, left = layout.compute, llama.block_parameters, llama.layers - done
    grown = 0 if layout.offload or not micro.first else FP32 * p * done / layout.shard
    return resting(llama, layout, gradients=not micro.first).plus(
        gradients=grown,
        activations=micro.tokens * left * _kept(llama, layout, micro) + act.tables(llama, e, micro.seq_len),
        gathered=e * llama.root_parameters + (0 if layout.reshard else e * p * left),
    )


def _kept(llama: Llama, layout: Layout, micro: MicroBatch) -> int:
    """Of a block from its forward to its backward, per token; where ghosts watch, the norms' inputs too."""
    taps = 2 * layout.compute * llama.width if micro.taps and layout.compute != FP32 else 0
    return act.block_kept(llama, layout.compute, layout.checkpointing) + taps


def _held(layout: Layout, micro: MicroBatch) -> int:
    """Tokens whose logits are there at a time; a chunk is at least one token of every sequence."""
    if not layout.loss_chunk:
        return micro.tokens
    return micro.sequences * min(micro.seq_len, max(1, layout.loss_chunk // micro.sequences))
