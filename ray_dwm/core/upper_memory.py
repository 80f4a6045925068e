"""What a bi-level step adds to a rank's memory, phase by phase, as engine/bilevel.py and engine/sketch.py take it.

A copy is one fp32 number for each parameter of a rank's shard. The order of events: what must be remembered before the
step (`begin`), the LM's step under watch, the target gradient, the direction, the contraction, and where the step is
audited the judge's forwards and the step taken again.
"""

from __future__ import annotations

from dataclasses import dataclass

from ray_dwm.core.accounting import Llama
from ray_dwm.core.activations import FP32
from ray_dwm.core.memory import Layout, MicroBatch, Phase, forward_phase, pass_phases, resting, shard_copy

FINITE_DIFFERENCES = ("one_sided", "central")
GHOSTS = ("ghost", "ghost_lowrank")
ORACLES = ("jvp", "exact")


@dataclass(frozen=True, kw_only=True, slots=True)
class Upper:
    """Settings of the bi-level step that cost memory, on one rank."""

    estimator: str
    rank: int
    contracted: int
    """Sequences whose gradients are contracted."""
    targets: int
    """Sequences that one target set gives to this rank."""
    at_once: int = 0
    """Target sequences that go through the LM at a time; 0: as many as the LM's micro-batch has."""
    sets: int = 1
    at_theta: bool = False
    reuse: bool = False
    """Whether a target gradient serves several steps."""
    hold: bool = False
    """Whether LM and optimizer are put back after the step."""
    statistics: int = 0
    """Numbers of the LM about each sequence that the DWM looks at, which go to its actor too."""


def matrices(llama: Llama) -> list[tuple[int, int]]:
    """(outputs, inputs) of every Linear: seven in each block, and the head."""
    d, k, m = llama.width, llama.kv_width, llama.mlp_width
    block = [(d, d), (k, d), (k, d), (d, d), (m, d), (m, d), (d, m)]
    return block * llama.layers + [(llama.vocab, d)]


def bases(llama: Llama, rank: int) -> int:
    """Bytes of P and Q of every matrix, whole on every rank."""
    return sum(FP32 * (o + i) * min(rank, i) for o, i in matrices(llama))


def upper_phases(llama: Llama, layout: Layout, micro: MicroBatch, upper: Upper, audited: bool) -> list[Phase]:
    """All phases of a step that is a bi-level step.

    Args:
        micro: the LM's own micro-batch, unwatched.
        audited: whether fidelity and realised change are measured too.
    """
    copy, everything = shard_copy(llama, layout), (1 + layout.moments) * shard_copy(llama, layout)
    theta = copy if audited or upper.estimator not in GHOSTS else 0
    kept = theta + (everything if audited else 0) + (everything if upper.hold else 0)
    v = upper.sets * copy + (copy if upper.sets > 1 else 0)
    before = kept + (v if upper.at_theta or upper.reuse else 0) + (copy if upper.estimator == "ghost" else 0)
    sketches = _sketches(llama, layout, micro.seq_len, upper)
    watched = MicroBatch(
        sequences=micro.sequences,
        seq_len=micro.seq_len,
        first=micro.first,
        taps=upper.estimator in GHOSTS,
    )
    found = [_begin(llama, layout, upper).plus(bilevel=before)]
    during = before + sketches + _matrix(llama, layout, upper)
    found += [x.plus(bilevel=during) for x in pass_phases(llama, layout, watched)]
    after = kept + copy + sketches  # the step's clipped gradient
    found += _target(llama, layout, micro, upper, after)
    rest = resting(llama, layout, gradients=False)
    consumed = not upper.reuse and not audited
    largest = FP32 * max(llama.vocab * llama.width, llama.width * llama.mlp_width) / layout.shard
    direction = after + v + (0 if consumed else copy)
    found.append(rest.named("direction").plus(bilevel=direction + 3 * largest))
    found.append(_contraction(llama, layout, micro, upper).plus(bilevel=direction))
    if audited:
        found.append(forward_phase(llama, layout, micro).named("fidelity").plus(bilevel=direction + 2 * copy))
        again = direction - sketches + everything
        found += [x.named(f"tried out: {x.name}").plus(bilevel=again) for x in pass_phases(llama, layout, micro)]
    return found


def _begin(llama: Llama, layout: Layout, upper: Upper) -> Phase:
    """Subspaces of the momentum: bases of the last collective, its flat buffer twice, and its parts."""
    made = 3 * bases(llama, upper.rank) if upper.estimator == "ghost_lowrank" else 0
    return resting(llama, layout, gradients=False).named("subspaces").plus(bilevel=made)


def _sketches(llama: Llama, layout: Layout, seq_len: int, upper: Upper) -> float:
    """Bases, one sketch for each sequence and matrix, and rows: the embedding's gradients and the head's inputs."""
    if upper.estimator != "ghost_lowrank":
        return 0
    sketch = sum(FP32 * min(upper.rank, i) ** 2 for _, i in matrices(llama))
    rows = 2 * seq_len * llama.width * layout.compute
    return bases(llama, upper.rank) + upper.contracted * (sketch + rows)


def _matrix(llama: Llama, layout: Layout, upper: Upper) -> int:
    """The largest matrix of u, gathered in the backward by `ghost`."""
    return layout.compute * llama.vocab * llama.width if upper.estimator == "ghost" else 0


def _target(llama: Llama, layout: Layout, micro: MicroBatch, upper: Upper, held: float) -> list[Phase]:
    """The target gradient's passes; v of the sets before it is kept."""
    sequences = min(upper.targets, upper.at_once or micro.sequences)
    own = MicroBatch(sequences=sequences, seq_len=micro.seq_len, first=upper.targets <= sequences)
    earlier = (upper.sets - 1) * shard_copy(llama, layout)
    return [x.named(f"target: {x.name}").plus(bilevel=held + earlier) for x in pass_phases(llama, layout, own)]


def _contraction(llama: Llama, layout: Layout, micro: MicroBatch, upper: Upper) -> Phase:
    """Beyond the direction: theta' and what is written for a finite difference; u's largest matrices for a sketch."""
    rest = resting(llama, layout, gradients=False).named("contraction")
    if upper.estimator in FINITE_DIFFERENCES:
        forward = forward_phase(llama, layout, micro).named("contraction")
        return forward.plus(bilevel=2 * shard_copy(llama, layout))
    if upper.estimator == "ghost_lowrank":
        return rest.plus(bilevel=(3 if layout.gloo else 2) * FP32 * llama.vocab * llama.width)
    if upper.estimator in ORACLES:
        # Roughly: theta, u and a twin, all whole, and gradients or tangents.
        return rest.plus(bilevel=4 * FP32 * llama.parameters)
    return rest
