"""What a plan says is sent, against the collectives that gloo ranks really call, to the byte."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from engine.gloo import run
from synthetic import tiny_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ray_dwm.config import RunConfig
from ray_dwm.core.traffic import Traffic, gather, lm_traffic
from ray_dwm.engine.batch import to_batch
from ray_dwm.engine.setup import build
from ray_dwm.engine.upper import UpperLevel
from ray_dwm.models.dwm import SIZES
from ray_dwm.planning.inputs import job
from ray_dwm.planning.plan import predicted_traffic

SINGLE = 16
"""Sums of so few bytes are of single numbers, which a plan leaves out."""


class Sent(TorchDispatchMode):
    """Bytes that this rank sends, by kind, if every collective is a ring's; sums are over two ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name()
        if name in ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_"):
            small, large = sorted(x.nbytes for x in args if isinstance(x, Tensor))
            # Gloo sums a copy everywhere where it should scatter.
            kind, times = ("all-gather", 1) if "gather" in name else ("reduce-scatter", 2)
            self.bytes[kind] += times * (large - small)
        elif name == "_c10d_functional::all_gather_into_tensor":
            self.bytes["all-gather"] += args[0].nbytes * (args[1] - 1)
        elif name == "c10d::allgather_":
            self.bytes["DWM"] += args[1][0].nbytes * (len(args[0][0]) - 1)
        elif name == "c10d::allreduce_" and args[0][0].nbytes > SINGLE:
            self.bytes["all-reduce"] += args[0][0].nbytes  # two ranks: 2 (n - 1) / n is 1
        else:
            assert "c10d" not in name or name.endswith(("wait_tensor", "autograd")) or "allreduce" in name, name
        return function(*args, **(kwargs or {}))


def sent(config: RunConfig) -> dict[str, dict[str, int]]:
    """By a plain step, and by one with weights that is a bi-level step."""
    parts = build(config)
    assert parts.weigher is not None
    upper = UpperLevel(config, parts.lower, parts.weigher, parts.targets, parts.seq_len, parts.device)
    rows = next(parts.source.stream(0, 1))
    batch = to_batch(rows, config.train.global_batch, parts.seq_len, parts.device)
    for step in range(2):  # the optimizer's state is there from the first on
        with Sent() as plain:
            parts.lower.step(step, batch, None)
        parts.lower.zero_grad()
    parts.weigher.advance(2)
    with Sent() as both:
        upper.begin(2, batch)
        upper.finish(2, batch, parts.lower.step(2, batch, parts.weigher))
    return {"plain": dict(plain.bytes), "both": dict(both.bytes)}


LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "sharded": (2, []),
    "one micro-batch, held": (2, ["train.micro_batch=4", "parallel.reshard_after_forward=false"]),
    "central": (2, ["bilevel.estimator=central"]),
    "2 x 2": (4, ["parallel.shard=2"]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_send_what_is_planned(shards: dict[str, Path], tmp_path: Path, name: str) -> None:
    world, options = LAYOUTS[name]
    fixed = ["bilevel.fidelity_every=0", "bilevel.every=2", "bilevel.warmup_steps=1", f"cluster.workers={world}"]
    config = tiny_config(shards, tmp_path, "train.micro_batch=2", *fixed, *options)
    planned, copies = job(config), world // 2
    found = run(world, tmp_path / "run", sent, config)
    lm = lm_traffic(planned.llama, planned.layout, copies, planned.micro_batches)
    assert found["plain"] == {kind: x for kind, x in lm.items() if x}
    # A bi-level step's mean over every = 2 steps, and what a step's log gathers, is in predicted_traffic.
    batch, width = config.train.global_batch, SIZES[config.dwm.size]["width"]
    logged = gather(20 * batch, world)
    always: Traffic = {**lm, "DWM": gather(batch * (4 * (width + 1)), world) + logged}
    visit = {kind: 2 * (x - always[kind]) for kind, x in predicted_traffic(config).items()}
    expected = {kind: always[kind] + x - (logged if kind == "DWM" else 0) for kind, x in visit.items()}
    assert found["both"] == pytest.approx({kind: x for kind, x in expected.items() if x})


def test_one_rank_sends_nothing(shards: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_config(shards, tmp_path, "cluster.workers=1")
    assert set(predicted_traffic(config).values()) == {0}
