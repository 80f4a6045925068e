"""What a bi-level step takes: uncompiled code, target gradients used again, and micro-batches of several sizes."""

from __future__ import annotations

import dataclasses

import pytest

from ray_dwm.config import load
from ray_dwm.core.costs import Speed
from ray_dwm.core.hardware import gpu
from ray_dwm.planning.estimate import Estimate, estimate
from ray_dwm.planning.inputs import job
from ray_dwm.planning.visit import Visit, refreshes

ALONE = [
    "lm.preset=1.3b",
    "prepare.seq_len=2048",
    "train.precision=bf16",
    "train.global_batch=8",
    "train.micro_batch=8",
    "cluster.workers=1",
    "cluster.gpus_per_worker=1",
]
"""One GPU, where nothing is sent and the LM's step is its compute."""
SPEED = Speed(gpu=gpu("h100"), bf16=True, mfu=0.39)


def planned(*words: str) -> Estimate:
    config = load([], [*ALONE, *words])
    return estimate(job(config), dataclasses.replace(SPEED, bf16=config.train.precision == "bf16"))


def visit(*words: str) -> Visit:
    found = planned(*words).visit
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("words", "more"),
    [
        (["parallel.compile=true"], 39 / 33 - 1),
        (["parallel.compile=true", "bilevel.estimator=ghost", "bilevel.target_at=theta"], 39 / 33 - 1),
        (["parallel.compile=true", "bilevel.estimator=one_sided"], 0),
        (["parallel.compile=true", "train.precision=fp32"], 0),
        ([], 0),
    ],
)
def test_a_step_that_ghosts_watch_is_not_compiled(words: list[str], more: float) -> None:
    """It has 33 / 39 of the MFU: of a step of t, 0.18 t is added, by the plan's overhead too."""
    found, with_it = planned(*words), visit(*words)
    assert with_it.eager == pytest.approx(more * found.step.compute, abs=1e-12)
    rest = dataclasses.replace(with_it, eager=0.0)
    assert with_it.total - rest.total == pytest.approx(with_it.eager, abs=1e-12)


@pytest.mark.parametrize(
    ("steps", "reuse", "staleness", "audits", "fresh", "stale"),
    [
        ((0,), 1, 50, 20, 1, 0),
        ((0, 10, 20, 30), 4, 50, 0, 1 / 4, 0),
        ((0, 10, 20, 30), 4, 15, 0, 1 / 2, 0),  # at 20 that of 0 is too old
        ((0, 10, 20, 30), 4, 9, 0, 1, 0),
        ((0, 10, 20, 30), 2, 50, 1, 1 / 2, 1 / 2),
        ((0, 10, 20, 30), 2, 50, 2, 1 / 2, 0),  # 0 and 20 are checked, and have made one
        ((0, 1, 2, 500, 501, 502), 4, 50, 3, 3 / 6, 0),  # two stages of three: at 0, at 500, and the fourth's next
    ],
)
def test_how_often_a_target_gradient_is_made(
    steps: tuple[int, ...], reuse: int, staleness: int, audits: int, fresh: float, stale: float
) -> None:
    assert refreshes(steps, reuse, staleness, audits) == pytest.approx((fresh, stale))


def test_a_target_gradient_that_serves_four_steps_costs_each_a_quarter() -> None:
    once, shared = visit(), visit("bilevel.reuse=4", "bilevel.fidelity_every=0")
    assert shared.target_gradient == pytest.approx(once.target_gradient / 4)
    old = visit("bilevel.reuse=4", "bilevel.max_staleness=15", "bilevel.fidelity_every=0")
    assert old.target_gradient == pytest.approx(once.target_gradient / 2)


def test_a_check_is_six_forwards_a_step_and_what_it_makes_anew() -> None:
    """Of 8 sequences the judge sees 4 four times; the target loss of 8 is taken twice: 4 steps' thirds, and a step."""
    checks = visit("bilevel.fidelity_every=10", "bilevel.fidelity_sequences=4").checks
    step = planned().step.compute
    assert checks == pytest.approx((step * (4 * 4 + 2 * 8) / 8 / 3 + step) / 10, rel=1e-6)
    at_theta = visit("bilevel.fidelity_every=10", "bilevel.fidelity_sequences=4", "bilevel.target_at=theta")
    assert at_theta.checks - checks == pytest.approx(at_theta.target_gradient / 10)


@pytest.mark.parametrize("micro", [1, 2, 3, 5, 7, 8])
def test_a_smaller_last_micro_batch_is_no_full_one(micro: int) -> None:
    found, whole = planned(f"train.micro_batch={micro}"), planned()
    assert found.step.compute == pytest.approx(whole.step.compute)
    assert found.visit is not None and whole.visit is not None
    assert found.visit.target_gradient == pytest.approx(whole.visit.target_gradient)


def test_statistics_take_a_forward_where_micro_batches_accumulate() -> None:
    """A third of the step; none where there is one micro-batch, whose own forward has them."""
    plain, single = planned().weigh, planned("dwm.lm_features=true").weigh
    assert single == plain
    again = planned("dwm.lm_features=true", "train.micro_batch=4").weigh
    assert again - plain == pytest.approx(planned().step.compute / 3)
    other = planned("weighting.method=loss", "train.micro_batch=4").weigh
    assert other == pytest.approx(planned().step.compute / 3)


def test_what_weights_send_is_waited_for() -> None:
    """64 GPUs in 8 nodes: four gathers; 65 numbers of the encoding, two statistics and 20 bytes of 512 sequences."""
    words = ["cluster.workers=64", "train.global_batch=512", "dwm.size=s", "dwm.lm_features=true"]
    found = planned(*words)
    ring = 8.4e-6 + 56 * 3.4e-6 + 7 * 14e-6
    sent = 512 * (4 * (65 + 2) + 20) * 63 / 64
    alone = planned("train.global_batch=8", "dwm.size=s").weigh
    assert found.traffic["DWM"] > sent
    assert found.weigh - alone == pytest.approx(4 * ring + sent / (0.8 * 400e9))
