"""Seconds by hand: 30 B tokens at 40 % MFU, what is computed again, and communication that hides or does not."""

from __future__ import annotations

import dataclasses

import pytest

from ray_dwm.core.accounting import Llama, train_flops_per_token
from ray_dwm.core.activations import recomputed
from ray_dwm.core.costs import (
    Speed,
    estimator_seconds,
    forward_flops,
    forward_seconds,
    micro_batches,
    offload_seconds,
    pass_time,
    passes_time,
)
from ray_dwm.core.hardware import gpu
from ray_dwm.core.memory import Layout
from ray_dwm.core.upper_memory import Upper

LARGE = Llama(vocab=32_000, width=2048, layers=24, heads=16, kv_heads=16, mlp_width=5504, tied=False)
SPEED = Speed(gpu=gpu("h100"), bf16=True, mfu=0.4)
TOKENS, SEQ_LEN = 8 * 2048, 2048
PARAMETERS = 1_345_423_360
FLOPS = 6 * (PARAMETERS - 32_000 * 2048) + 12 * 24 * 2048 * 2048
"""Of a token: 8.89 G."""
HEAD = 2 * 32_000 * 2048


def test_30_billion_tokens_on_one_gpu() -> None:
    """30e9 tokens of 8.89 GFLOPs at 0.4 * 989.5 TFLOP/s: 187 GPU-hours."""
    time = pass_time(LARGE, Layout(compute=2), 1, SPEED, 1, 30e9, SEQ_LEN)
    assert time.compute == pytest.approx(30e9 * FLOPS / (0.4 * 989.5e12))
    assert time.compute / 3600 == pytest.approx(187.1, abs=0.1)
    assert (time.again, time.communication, time.exposed, time.total) == (0, 0, 0, time.compute)


def test_shared_keys_change_parameters_and_not_attention() -> None:
    shared = dataclasses.replace(LARGE, kv_heads=4)
    saved = 24 * 2 * 2048 * (2048 - 512)  # k and v are a quarter as wide
    assert LARGE.parameters - shared.parameters == saved
    assert LARGE.flops_per_token(SEQ_LEN) - shared.flops_per_token(SEQ_LEN) == 6 * saved
    assert (
        LARGE.flops_per_token(SEQ_LEN)
        == FLOPS
        == train_flops_per_token(
            parameters=PARAMETERS, embedding_parameters=32_000 * 2048, layers=24, width=2048, seq_len=SEQ_LEN
        )
    )


def test_what_is_computed_again() -> None:
    """full: the forward without the head, a third of the step. A chunked loss: the head. selective: memory traffic."""

    def again(**changes: object) -> float:
        layout = dataclasses.replace(Layout(compute=2), **changes)  # type: ignore[arg-type]
        return pass_time(LARGE, layout, 1, SPEED, 1, TOKENS, SEQ_LEN).again

    assert again(checkpointing="full") == pytest.approx(TOKENS * (FLOPS / 3 - HEAD) / SPEED.flops)
    assert again(loss_chunk=TOKENS) == again(loss_chunk=10 * TOKENS) == 0  # which holds all of it
    assert again(loss_chunk=64) == pytest.approx(TOKENS * HEAD / SPEED.flops)
    bytes_again = 2 * 24 * recomputed(LARGE, 2, "selective")
    assert again(checkpointing="selective") == pytest.approx(TOKENS * bytes_again / 3.35e12)
    assert 0 < again(checkpointing="selective") < 0.3 * again(checkpointing="full")


def test_communication_hides_behind_enough_tokens() -> None:
    layout = Layout(compute=2, shard=8)
    ample, scarce = (pass_time(LARGE, layout, 1, SPEED, 1, tokens, SEQ_LEN) for tokens in (TOKENS, 64))
    assert ample.communication == scarce.communication
    assert ample.exposed < 0.15 * ample.communication  # only the first gathers and the root's reduction
    assert scarce.exposed > 0.8 * scarce.communication
    # 7/8 of 2 bytes for blocks twice and the root once, and of 4 bytes, at 0.8 * 450 GB/s; 49 gathers, 25 reductions.
    blocks, root = 24 * LARGE.block_parameters, LARGE.root_parameters
    sent = 7 / 8 * (2 * (2 * blocks + root) + 4 * PARAMETERS)
    assert ample.communication == pytest.approx(sent / (0.8 * 450e9) + (49 + 25) * (8.4e-6 + 7 * 3.4e-6), rel=1e-6)


def test_copies_across_a_slow_network_cannot_hide() -> None:
    slow = dataclasses.replace(SPEED, gpu=dataclasses.replace(SPEED.gpu, network=1e9))
    fast = pass_time(LARGE, Layout(compute=2, shard=8), 8, SPEED, 1, TOKENS, SEQ_LEN)
    slowed = pass_time(LARGE, Layout(compute=2, shard=8), 8, slow, 1, TOKENS, SEQ_LEN)
    more = 2 * (7 / 8) * 4 * PARAMETERS / 8 * (1 / (0.8 * 1e9) - 1 / (0.8 * 50e9))
    assert slowed.communication - fast.communication == pytest.approx(more)
    assert slowed.exposed > 0.5 * slowed.communication


@pytest.mark.parametrize(("estimator", "forwards"), [("one_sided", 1), ("central", 2), ("ghost", 1)])
def test_contraction_in_forwards(estimator: str, forwards: int) -> None:
    upper = Upper(estimator=estimator, rank=32, contracted=8, targets=1)
    found = estimator_seconds(LARGE, Layout(compute=2, shard=64), SPEED, upper, TOKENS, SEQ_LEN)
    forward = TOKENS * forward_flops(LARGE, SEQ_LEN) / SPEED.flops
    assert found["contraction"] == pytest.approx(forwards * forward, rel=0.01)


def test_sketches_cost_less_than_a_forward_and_grow_with_their_rank() -> None:
    def contraction(rank: int) -> float:
        upper = Upper(estimator="ghost_lowrank", rank=rank, contracted=8, targets=1)
        return estimator_seconds(LARGE, Layout(compute=2, shard=8), SPEED, upper, TOKENS, SEQ_LEN)["contraction"]

    assert contraction(16) < contraction(32) < contraction(256)
    assert contraction(32) < 0.2 * TOKENS * forward_flops(LARGE, SEQ_LEN) / SPEED.flops


@pytest.mark.parametrize(
    ("sequences", "size", "parts"),
    [(8, 8, [(1, 8)]), (8, 4, [(2, 4)]), (8, 3, [(2, 3), (1, 2)]), (3, 8, [(1, 3)])],
)
def test_a_last_micro_batch_may_be_smaller(sequences: int, size: int, parts: list[tuple[int, int]]) -> None:
    assert micro_batches(sequences, size) == parts


def test_micro_batches_of_several_sizes_add_up() -> None:
    layout = Layout(compute=2, shard=8)
    found = passes_time(LARGE, layout, 1, SPEED, [(2, 3), (1, 2)], SEQ_LEN)
    three, two = (pass_time(LARGE, layout, 1, SPEED, 1, n * SEQ_LEN, SEQ_LEN) for n in (3, 2))
    assert found.total == pytest.approx(2 * three.total + two.total)
    assert found.compute == pytest.approx(TOKENS * FLOPS / SPEED.flops)


def test_a_forward_without_a_backward_is_a_third_or_its_gathers() -> None:
    alone = forward_seconds(LARGE, Layout(compute=2), 1, SPEED, 4, TOKENS, SEQ_LEN)
    assert alone == pytest.approx(TOKENS * FLOPS / 3 / SPEED.flops)
    # With next to no tokens: 7/8 of 2 bytes of the root once and of 24 blocks four times, at 0.8 * 450 GB/s.
    bare = forward_seconds(LARGE, Layout(compute=2, shard=8), 1, SPEED, 4, 0, SEQ_LEN)
    sent = 7 / 8 * 2 * (4 * 24 * LARGE.block_parameters + LARGE.root_parameters)
    assert bare == pytest.approx(sent / (0.8 * 450e9) + (4 * 24 + 1) * (8.4e-6 + 7 * 3.4e-6))
    held = forward_seconds(LARGE, Layout(compute=2, shard=8, reshard=False), 1, SPEED, 4, 0, SEQ_LEN)
    assert held < 0.3 * bare


@pytest.mark.parametrize(("moments", "updated"), [(2, 28), (1, 20), (0, 12)])
def test_an_offloaded_optimizer_is_as_slow_as_its_bus(moments: int, updated: int) -> None:
    """Three micro-batches: fp32 shards twice to the GPU, gradients back, and the update; half of 64 GB/s."""
    layout = Layout(compute=2, shard=8, offload=True, moments=moments)
    found = offload_seconds(LARGE, layout, SPEED, 3)
    assert found == pytest.approx(PARAMETERS / 8 * (3 * 12 + updated) / 32e9)
