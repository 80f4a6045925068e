"""The phases of a step, worked out by hand for a small LM, and what must hold for every layout."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from ray_dwm.core import activations as act
from ray_dwm.core.accounting import Llama
from ray_dwm.core.memory import Layout, MicroBatch, pass_phases, peak, resting
from ray_dwm.core.upper_memory import Upper, bases, upper_phases

SMALL = Llama(vocab=10, width=4, layers=2, heads=2, kv_heads=1, mlp_width=8, tied=False)
BLOCK, ROOT = 2 * 4 * 4 + 2 * 4 * 2 + 3 * 4 * 8 + 2 * 4, 2 * 10 * 4 + 4
LARGE = Llama(vocab=32_000, width=2048, layers=24, heads=16, kv_heads=16, mlp_width=5504, tied=False)
MICRO = MicroBatch(sequences=8, seq_len=2048, first=True)
UPPER = Upper(estimator="ghost_lowrank", rank=32, contracted=8, targets=1)


def phases(llama: Llama, layout: Layout, micro: MicroBatch) -> dict[str, dict[str, float]]:
    return {phase.name: phase.parts for phase in pass_phases(llama, layout, micro)}


def test_parameters_by_hand() -> None:
    assert (SMALL.block_parameters, SMALL.root_parameters) == (BLOCK, ROOT) == (152, 84)
    assert SMALL.parameters == 2 * 152 + 84 == 388
    wide = 2 * 32_000 * 2048 + 24 * (4 * 2048**2 + 3 * 2048 * 5504 + 2 * 2048) + 2048
    assert LARGE.parameters == wide == 1_345_423_360


def test_what_rests_by_hand() -> None:
    """1.3b on eight ranks: 4, 4 and 8 bytes for each of 168 M parameters."""
    rest = resting(LARGE, Layout(compute=2, shard=8), gradients=True).parts
    copy = 4 * 1_345_423_360 / 8
    assert (rest["parameters"], rest["gradients"], rest["optimizer"]) == (copy, copy, 2 * copy)
    assert resting(LARGE, Layout(compute=2, shard=8, moments=0), gradients=False).total == copy
    assert resting(LARGE, Layout(compute=2, shard=8, offload=True), gradients=True).total == 0


def test_the_loss_by_hand() -> None:
    """2 x 3 tokens of the small LM in bf16 on 2 ranks: two blocks' activations, all logits."""
    found = phases(SMALL, Layout(compute=2, shard=2), MicroBatch(sequences=2, seq_len=3, first=True))
    kept = 6 * (2 * act.block_saved(SMALL, 2) + act.tail_saved(SMALL, 2)) + 2 * 2 * 3 * 2
    forward, backward, head = (found[name] for name in ("loss, forward", "loss, backward", "head, backward"))
    assert forward["activations"] == backward["activations"] == kept
    assert forward["logits"] == 6 * 10 * (2 + 4 + 4)  # logits in bf16 and in fp32, log-probabilities
    assert backward["logits"] == 6 * 10 * (4 + 4 + 4)
    assert head["logits"] == 6 * (10 * 2 + 4 * 2)
    assert head["reduction"] == 2 * 10 * 4
    assert forward["gathered"] == 2 * ROOT + 2 * BLOCK  # the last block's gather is still there
    assert backward["gathered"] == 2 * ROOT + 2 * BLOCK  # and is made again for its backward
    assert backward["parameters"] == 4 * 388 / 2
    assert backward["gradients"] == 0


def test_chunks_of_the_loss_by_hand() -> None:
    """Chunks of 4 tokens of 2 sequences: 2 tokens of each at a time."""
    micro = MicroBatch(sequences=2, seq_len=3)
    found = phases(SMALL, Layout(compute=2, loss_chunk=4), micro)
    assert found["loss, backward"]["logits"] == 4 * 10 * 12
    assert found["head, backward"]["reduction"] == 2 * (2 * 10 * 4)  # a chunk's gradient of the head, and the sum
    assert phases(SMALL, Layout(compute=2, loss_chunk=1), micro)["loss, backward"]["logits"] == 2 * 10 * 12
    assert phases(SMALL, Layout(compute=2, loss_chunk=9), micro) == phases(SMALL, Layout(compute=2), micro)


def test_the_end_of_the_backward_by_hand() -> None:
    """Gradients of the root in bf16 and in fp32; on the way there, the last block's fp32 copy."""
    found = phases(SMALL, Layout(compute=2, shard=2), MicroBatch(sequences=2, seq_len=3, first=True))
    root = found["root, reduction"]
    head = 2 * 10 * 4
    # The fp32 copy, and first the gradients in bf16, then the head's, which stays, and fp32 over two ranks.
    assert root["reduction"] == 4 * ROOT + max(2 * ROOT, head + 4 * ROOT / 2)
    gloo = phases(SMALL, Layout(compute=2, shard=2, gloo=True), MicroBatch(sequences=2, seq_len=3, first=True))
    assert gloo["root, reduction"]["reduction"] == 4 * ROOT + head + 4 * ROOT / 2 + 4 * ROOT
    assert root["gradients"] == 4 * 2 * BLOCK / 2
    assert root["gathered"] == 0
    assert found["embedding, backward"]["reduction"] == 2 * ROOT + 4 * BLOCK
    tied = dataclasses.replace(SMALL, tied=True)
    shared = phases(tied, Layout(compute=2), MicroBatch(sequences=2, seq_len=3, first=True))
    assert shared["embedding, backward"]["reduction"] == 2 * (10 * 4 + 4) + 2 * (2 * 10 * 4) + 4 * BLOCK


@pytest.mark.parametrize("chunk", [0, 2048])
@pytest.mark.parametrize("reshard", [True, False])
def test_more_recomputation_never_needs_more(chunk: int, reshard: bool) -> None:
    for shard in (1, 8):
        layouts = [
            Layout(compute=2, shard=shard, reshard=reshard, checkpointing=mode, loss_chunk=chunk)
            for mode in ("full", "selective", "none")
        ]
        full, selective, none = (peak(pass_phases(LARGE, layout, MICRO)).total for layout in layouts)
        assert full <= selective <= none


def test_more_shards_never_need_more() -> None:
    for shard in (2, 4, 8, 16):
        few, many = (Layout(compute=2, shard=s) for s in (shard, 2 * shard))
        for left, right in zip(pass_phases(LARGE, few, MICRO), pass_phases(LARGE, many, MICRO), strict=True):
            assert right.total < left.total
            assert right.parts["parameters"] == left.parts["parameters"] / 2


def test_holding_blocks_needs_a_gathered_lm() -> None:
    held = phases(LARGE, Layout(compute=2, shard=8, reshard=False), MICRO)["loss, backward"]["gathered"]
    assert held == 2 * LARGE.parameters


def test_bases_by_hand() -> None:
    """q and o are 4 x 4, k and v 2 x 4, gate and up 8 x 4, down 4 x 8, the head 10 x 4; rank 2."""
    sides = 2 * (2 * 8 + 2 * 6 + 2 * 12 + 12) + 14
    assert bases(SMALL, 2) == 4 * 2 * sides
    # A matrix of 4 inputs has no more than 4 directions; down has 8.
    assert bases(SMALL, 6) == 4 * (2 * (4 * (2 * 8 + 2 * 6 + 2 * 12) + 6 * 12) + 4 * 14)


@pytest.mark.parametrize("estimator", ["ghost_lowrank", "ghost", "one_sided", "central"])
def test_a_bilevel_step_needs_more_and_an_audited_one_still_more(estimator: str) -> None:
    layout = Layout(compute=2, shard=8, checkpointing="full")
    upper = dataclasses.replace(UPPER, estimator=estimator, at_theta=estimator == "ghost")
    plain = peak(pass_phases(LARGE, layout, MICRO)).total
    visited, audited = (peak(upper_phases(LARGE, layout, MICRO, upper, x)).total for x in (False, True))
    assert plain < visited < audited


def test_an_audited_step_holds_lm_and_optimizer_twice() -> None:
    """While it is tried out: theta, LM and optimizer before and after, clipped gradient, v and u: 1 + 3 + 3 + 3."""
    found = {x.name: x for x in upper_phases(LARGE, Layout(compute=2, shard=8), MICRO, UPPER, True)}
    assert found["tried out: root, reduction"].parts["bilevel"] == 10 * 4 * LARGE.parameters / 8


def test_levers_of_the_upper_level_cost_what_they_hold() -> None:
    layout, copy = Layout(compute=2, shard=8), 4 * LARGE.parameters / 8

    def directions(**changes: object) -> float:
        upper = dataclasses.replace(UPPER, **changes)  # type: ignore[arg-type]
        return next(x.total for x in upper_phases(LARGE, layout, MICRO, upper, False) if x.name == "direction")

    base = directions()
    assert directions(reuse=True) == base + copy  # u beside v
    assert directions(sets=3) == base + 3 * copy  # each set's v, and their sum
    assert directions(hold=True) == base + 3 * copy  # LM and optimizer
    assert directions(estimator="central") - base == pytest.approx(
        copy - bases(LARGE, 32) - 8 * (4 * 32 * 32 * (24 * 7 + 1) + 2 * 2048 * 2048 * 2)
    )


def test_every_layout_has_no_negative_part() -> None:
    modes, flags = ("none", "selective", "full"), (True, False)
    for mode, reshard, shard, chunk in itertools.product(modes, flags, (1, 8), (0, 512)):
        layout = Layout(compute=2, shard=shard, reshard=reshard, checkpointing=mode, loss_chunk=chunk)
        for phase in upper_phases(LARGE, layout, MICRO, UPPER, True):
            assert min(phase.parts.values()) >= 0, phase
