"""The slowest link that a ring crosses, by hand, on nodes of eight."""

from __future__ import annotations

import pytest

from ray_dwm.core.hardware import gpu
from ray_dwm.core.links import BASE, HOP_NETWORK, HOP_NVLINK, HOP_PCIE, Links, bus, latency
from ray_dwm.core.memory import Layout

H100 = gpu("h100")
"""450 GB/s in a node, 50 GB/s for each GPU between nodes; four fifths of both."""


@pytest.mark.parametrize(
    ("ring", "rate"),
    [
        (range(8), 450e9),
        (range(64), 400e9),  # eight ports leave every node
        (range(0, 64, 8), 50e9),
        (range(0, 64, 4), 100e9),
        (range(12), 200e9),  # four GPUs, and ports, in the second node
        (range(9), 50e9),
        (range(6, 12), 100e9),  # two in the first node
    ],
)
def test_a_ring_is_as_fast_as_where_it_has_the_fewest_ranks(ring: range, rate: float) -> None:
    assert bus(H100, [ring]) == 0.8 * rate


@pytest.mark.parametrize(
    ("shard", "copies", "rates"),
    [
        (8, 8, (450e9, 50e9, 400e9)),
        (4, 16, (450e9, 100e9, 400e9)),
        (64, 1, (400e9, 450e9, 400e9)),
        (6, 4, (100e9, 50e9, 400e9)),  # two of four copies straddle nodes, with two ranks on one side
        (6, 2, (100e9, 50e9, 200e9)),  # twelve GPUs: eight and four
        (12, 1, (200e9, 450e9, 200e9)),
        (3, 8, (50e9, 100e9, 400e9)),  # copies of three, one of which leaves one rank behind
        (2, 4, (450e9, 450e9, 450e9)),
    ],
)
def test_links_of_a_mesh(shard: int, copies: int, rates: tuple[float, float, float]) -> None:
    found = Links.of(H100, Layout(compute=2, shard=shard), copies)
    assert (found.shard, found.copies, found.all) == tuple(0.8 * rate for rate in rates)


def test_rings_over_pcie_reach_less() -> None:
    """64 GB/s, of which two fifths; between nodes eight ports of 25 GB/s are more, one is less."""
    card = gpu("h100-pcie")
    assert bus(card, [range(8)]) == bus(card, [range(16)]) == 0.4 * 64e9
    assert bus(card, [range(0, 16, 8)]) == 0.8 * 25e9


def test_a_ring_has_to_be_gone_round() -> None:
    assert latency(H100, [range(1)]) == 0
    assert latency(H100, [range(8)]) == pytest.approx(BASE + 7 * HOP_NVLINK)
    assert latency(H100, [range(64)]) == pytest.approx(BASE + 56 * HOP_NVLINK + 7 * HOP_NETWORK)
    assert latency(H100, [range(6), range(6, 12)]) == pytest.approx(BASE + 4 * HOP_NVLINK + HOP_NETWORK)
    assert latency(gpu("l40s"), [range(8)]) == pytest.approx(BASE + 7 * HOP_PCIE)


def test_every_kind_is_timed_on_its_own_link() -> None:
    """Bases are summed within a copy, gradients between copies."""
    found = Links.of(H100, Layout(compute=2, shard=8), 8)
    gigabyte = dict.fromkeys(("all-gather", "reduce-scatter", "all-reduce", "bases", "DWM"), 1e9)
    near, far, every = 1 / 360, 1 / 40, 1 / 320
    expected = {"all-gather": near, "reduce-scatter": near, "all-reduce": far, "bases": near, "DWM": every}
    assert found.seconds(gigabyte) == pytest.approx(expected)
