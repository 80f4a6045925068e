"""Bytes on a mesh of 2 x 4 by hand, and the links that they meet."""

from __future__ import annotations

import pytest

from ray_dwm.core.accounting import Llama
from ray_dwm.core.hardware import GPUS, gpu
from ray_dwm.core.memory import Layout
from ray_dwm.core.traffic import BASE, HOP_LINK, HOP_NETWORK, Links, bus, latency, lm_traffic, step_traffic
from ray_dwm.errors import ConfigError

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
    assert step_traffic(workers=4, batch=16, dwm_width=32) == {"DWM": 16 * (4 * 33 + 16 + 4) * 3 / 4}


def test_rings_use_what_links_their_ranks() -> None:
    """H100: 450 GB/s in a node, 50 GB/s for each GPU between nodes; four fifths of that."""
    h100 = gpu("h100")
    assert bus(h100, 8, 8) == 0.8 * 450e9
    assert bus(h100, 64, 8) == 0.8 * 400e9  # eight rings, eight ports
    assert bus(h100, 8, 1) == 0.8 * 50e9
    hsdp = Links.of(h100, Layout(compute=2, shard=8), copies=8)
    assert (hsdp.shard, hsdp.copies, hsdp.all) == (0.8 * 450e9, 0.8 * 50e9, 0.8 * 400e9)
    two_in_a_node = Links.of(h100, Layout(compute=2, shard=4), copies=16)
    assert two_in_a_node.copies == 0.8 * 100e9


def test_a_ring_has_to_be_gone_round() -> None:
    assert latency(1, 1) == 0
    assert latency(8, 8) == pytest.approx(BASE + 7 * HOP_LINK)
    assert latency(64, 8) == pytest.approx(BASE + 56 * HOP_LINK + 7 * HOP_NETWORK)


def test_gpus_are_dense_and_one_way() -> None:
    """Vendors print 1,979 TFLOPS with sparsity and 900 GB/s both ways."""
    assert GPUS["h100"].bf16 == pytest.approx(1979e12 / 2)
    assert GPUS["h100"].link == 900e9 / 2
    assert GPUS["h100-pcie"].bf16 < GPUS["h100"].bf16
    assert GPUS["a100-40g"].memory == 40e9


def test_an_unknown_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'v100': it must be one of a100-40g, a100, h100, h100-pcie, h200, b200, "):
        gpu("v100")
