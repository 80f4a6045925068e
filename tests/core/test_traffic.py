"""Bytes on a mesh of 2 x 4 by hand."""

from __future__ import annotations

import pytest

from ray_dwm.core.accounting import Llama
from ray_dwm.core.memory import Layout
from ray_dwm.core.traffic import (
    Passes,
    added,
    audit_traffic,
    lm_traffic,
    step_traffic,
    upper_collectives,
    upper_traffic,
)
from ray_dwm.core.upper_memory import Upper

SMALL = Llama(vocab=10, width=4, layers=2, heads=2, kv_heads=1, mlp_width=8, tied=False)
BLOCKS, ROOT = 2 * 152, 84


def test_a_mesh_of_2_x_4_by_hand() -> None:
    """Three micro-batches in bf16: blocks gathered twice, the root once; fp32 gradients scattered, then summed."""
    found = lm_traffic(SMALL, Layout(compute=2, shard=4), copies=2, passes=3)
    assert found == {
        "all-gather": 3 * (2 * BLOCKS + ROOT) * 2 * 3 / 4,
        "reduce-scatter": 3 * (BLOCKS + ROOT) * 4 * 3 / 4,
        "all-reduce": 3 * 2 * (1 / 2) * (BLOCKS + ROOT) * 4 / 4,
    }
    assert list(found.values()) == [3114, 3492, 1164]


def test_what_does_not_reshard_is_gathered_once() -> None:
    held = Layout(compute=4, shard=4, reshard=False)
    assert lm_traffic(SMALL, held, 1, 3)["all-gather"] == 3 * (BLOCKS + ROOT) * 4 * 3 / 4
    assert lm_traffic(SMALL, held, 1, 3, backward=False) == {
        "all-gather": (BLOCKS + ROOT) * 4 * 3 / 4,
        "reduce-scatter": 0,
        "all-reduce": 0,
    }


def test_gloo_sums_everywhere_where_it_should_scatter() -> None:
    nccl, gloo = (lm_traffic(SMALL, Layout(compute=2, shard=4, gloo=x), 2, 1) for x in (False, True))
    assert gloo == {**nccl, "reduce-scatter": 2 * nccl["reduce-scatter"]}


def test_weights_cost_an_encoding_a_sequence() -> None:
    assert step_traffic(workers=4, rows=16, numbers=33) == {"DWM": 16 * (4 * 33 + 16 + 4) * 3 / 4}


def visit(estimator: str, **upper: int) -> dict[str, float]:
    """Bytes of a bi-level step on 2 x 4 without a target gradient; 8 tokens, 16 sequences, of which 2 on each rank."""
    settings = Upper(estimator=estimator, rank=2, contracted=2, targets=1, **upper)
    passes = Passes(step=3, chunks=2, target=0, contracted=1)
    return upper_traffic(SMALL, Layout(compute=2, shard=4), 2, settings, passes, seq_len=8, rows=16)


def test_bases_are_summed_within_a_copy() -> None:
    """For a matrix (O, I): 4 (2I + O + 2) * 2 bytes of bases and core, 64 of Gram matrices; the head's is (10, 4)."""
    sides = 2 * [(4, 4), (2, 4), (2, 4), (4, 4), (8, 4), (8, 4), (4, 8)] + [(10, 4)]
    numbers = sum(4 * (2 * i + o + 2) * 2 + 64 for o, i in sides)
    found = visit("ghost_lowrank")
    assert found["bases"] == 2 * numbers * 3 / 4
    assert found["all-reduce"] == 0
    assert found["all-gather"] == 2 * 4 * 10 * 4 * 3 / 4


def test_ghosts_gather_u_in_every_backward_and_the_heads_part_for_every_chunk() -> None:
    """Blocks, the final norm, the embedding once and the head twice, in bf16, in three micro-batches of the step."""
    assert visit("ghost")["all-gather"] == 3 * 2 * (BLOCKS + 4 + 3 * 40) * 3 / 4


@pytest.mark.parametrize(
    ("estimator", "collectives"),
    [
        ("ghost", 3 * (2 * 9 + 2 + 2)),
        ("ghost_lowrank", 2 + 2 * 6),
        ("one_sided", 2 + 1),
        ("central", 2 * (2 + 1)),
        ("exact", 2 * (2 * 9 + 3)),
    ],
)
def test_every_collective_of_an_estimator_is_waited_for(estimator: str, collectives: int) -> None:
    """Two blocks of nine parameters; three micro-batches of the step, two chunks each, one that is contracted."""
    settings = Upper(estimator=estimator, rank=2, contracted=2, targets=1)
    passes = Passes(step=3, chunks=2, target=0, contracted=1)
    assert upper_collectives(SMALL, Layout(compute=2, shard=4), settings, passes) == collectives


def test_feedback_is_token_ids_and_alignments_of_what_is_contracted() -> None:
    assert visit("central")["DWM"] == (16 * 8 * 8 + 8 * 2 * 12) * 7 / 8
    assert visit("central", statistics=2)["DWM"] == (16 * (8 * 8 + 8) + 8 * 2 * 12) * 7 / 8


def test_a_check_takes_six_rounds_of_forwards_and_a_step() -> None:
    """On 2 x 4: four of the judge in one micro-batch, the target loss twice in five; the step in three."""
    layout, passes = Layout(compute=2, shard=4), Passes(step=3, chunks=1, target=5, contracted=1)
    found = audit_traffic(SMALL, layout, 2, passes, judged=(1, 1))
    forwards = 4 * (BLOCKS + ROOT) + 2 * (5 * BLOCKS + ROOT)
    assert found["all-gather"] == (forwards + 3 * (2 * BLOCKS + ROOT)) * 2 * 3 / 4
    assert found["reduce-scatter"] == 3 * (BLOCKS + ROOT) * 4 * 3 / 4
    assert found["DWM"] == 2 * 8 * 12 * 7 / 8


def test_traffics_add_up() -> None:
    assert added((2, {"a": 1.0}), (0.5, {"a": 4.0, "b": 8.0})) == {"a": 4.0, "b": 4.0}
