"""What a plan says is sent, against the collectives that gloo ranks really call, to the byte."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from engine.gloo import run_all
from synthetic import tiny_config
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ray_dwm.config import RunConfig
from ray_dwm.core.traffic import Traffic, added, gather, lm_traffic
from ray_dwm.engine.batch import to_batch
from ray_dwm.engine.mesh import Layout
from ray_dwm.engine.setup import build
from ray_dwm.engine.upper import UpperLevel
from ray_dwm.planning.inputs import job
from ray_dwm.planning.plan import predicted_traffic

SINGLE = 16
"""Sums of so few bytes are of single numbers, which a plan leaves out."""


class Sent(TorchDispatchMode):
    """Bytes that this rank sends, by kind, if every collective is a ring's; sums are over two ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()
        self.summed = "all-reduce"
        """Kind of a sum that comes now."""

    @contextmanager
    def bases(self) -> Iterator[None]:
        """Sums within a copy of the LM are of the sketches' bases, not FSDP's over the copies."""
        original = Layout.sum

        def watched(layout: Layout, values: Tensor) -> Tensor:
            self.summed = "bases"
            try:
                return original(layout, values)
            finally:
                self.summed = "all-reduce"

        with patch.object(Layout, "sum", watched), self:
            yield

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
            self.bytes[self.summed] += args[0][0].nbytes  # two ranks: 2 (n - 1) / n is 1
        else:
            assert "c10d" not in name or name.endswith(("wait_tensor", "autograd")) or "allreduce" in name, name
        return function(*args, **(kwargs or {}))


VISITS = 2


def sent(config: RunConfig) -> dict[str, dict[str, float]]:
    """By a plain step, by one with weights, and in the mean by bi-level steps with weights."""
    parts = build(config)
    assert parts.weigher is not None
    upper = UpperLevel(config, parts.lower, parts.weigher, parts.targets, parts.seq_len, parts.device)
    rows = next(parts.source.stream(0, 1))
    batch = to_batch(rows, config.train.global_batch, parts.seq_len, parts.device)
    for _ in range(2):  # the optimizer's state is there from the first on
        with Sent() as plain:
            parts.lower.step(0, batch, None)
        parts.lower.zero_grad()
    with Sent() as weighed:
        parts.lower.step(0, batch, parts.weigher)
    parts.lower.zero_grad()
    both = Sent()
    for step in (1, 3):  # every second one after a warm-up of one
        parts.weigher.advance(step)
        with both.bases():
            upper.begin(step, batch)
            upper.finish(step, batch, parts.lower.step(step, batch, parts.weigher))
    mean = {kind: x / VISITS for kind, x in both.bytes.items()}
    return {"plain": dict(plain.bytes), "weighed": dict(weighed.bytes), "both": mean}


LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "sharded": (2, []),
    "one micro-batch, held": (2, ["train.micro_batch=4", "parallel.reshard_after_forward=false"]),
    "a smaller last micro-batch": (2, ["train.micro_batch=3"]),
    "central": (2, ["bilevel.estimator=central"]),
    "2 x 2": (4, ["parallel.shard=2"]),
    "a part contracted": (2, ["bilevel.fraction=0.5"]),
    "ghost": (2, ["bilevel.estimator=ghost", "bilevel.target_at=theta"]),
    "ghost, part, chunks": (
        2,
        ["bilevel.estimator=ghost", "bilevel.target_at=theta", "bilevel.fraction=0.25", "parallel.loss_chunk=8"],
    ),
    "reuse": (2, ["bilevel.reuse=2"]),
    "too old to use again": (2, ["bilevel.reuse=2", "bilevel.max_staleness=1"]),
    "checks": (2, ["bilevel.fidelity_every=2"]),
    "checks, held": (2, ["bilevel.fidelity_every=1", "parallel.reshard_after_forward=false"]),
    "checks of a target gradient used again": (2, ["bilevel.fidelity_every=1", "bilevel.reuse=2"]),
    "checks at theta": (2, ["bilevel.fidelity_every=1", "bilevel.target_at=theta", "bilevel.estimator=one_sided"]),
    "LM's statistics": (2, ["dwm.lm_features=true"]),
    "LM's statistics, held": (2, ["dwm.lm_features=true", "parallel.reshard_after_forward=false"]),
    "LM's statistics, one micro-batch": (2, ["dwm.lm_features=true", "train.micro_batch=4"]),
    "all of it on 2 x 2": (
        4,
        ["parallel.shard=2", "bilevel.fidelity_every=2", "bilevel.reuse=2", "dwm.lm_features=true"],
    ),
}


@pytest.fixture(scope="module")
def layouts(shards: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[RunConfig, Any]]:
    """Name -> (configuration, what its ranks sent)."""
    folder, calls = tmp_path_factory.mktemp("sent"), {}
    for name, (world, options) in LAYOUTS.items():
        fixed = ["bilevel.fidelity_every=0", "bilevel.every=2", "bilevel.warmup_steps=1", f"cluster.workers={world}"]
        calls[name] = (world, tiny_config(shards, folder, "train.micro_batch=2", "train.steps=40", *fixed, *options))
    found = run_all(folder, sent, calls)
    return {name: (config, found[name]) for name, (_, config) in calls.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_send_what_is_planned(layouts: dict[str, tuple[RunConfig, Any]], name: str) -> None:
    config, found = layouts[name]
    world = LAYOUTS[name][0]
    planned, copies = job(config), world // 2
    lm = lm_traffic(planned.llama, planned.layout, copies, planned.micro_batches)
    assert found["plain"] == {kind: x for kind, x in lm.items() if x}
    # With weights alone: as with a DWM that is not learnt, without the 20 bytes a sequence that a step's log gathers.
    frozen = dataclasses.replace(config, dwm=dataclasses.replace(config.dwm, mode="frozen", init_from="any"))
    log: Traffic = {"DWM": gather(20 * config.train.global_batch, world)}
    always = predicted_traffic(frozen)
    assert found["weighed"] == {kind: x for kind, x in added((1, always), (-1, log)).items() if x}
    # A bi-level step at every second step is by half in the mean that is predicted.
    expected = added((2, predicted_traffic(config)), (-1, always), (-1, log))
    assert found["both"] == pytest.approx({kind: x for kind, x in expected.items() if x})


def test_one_rank_sends_nothing(shards: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_config(shards, tmp_path, "cluster.workers=1")
    assert set(predicted_traffic(config).values()) == {0}
