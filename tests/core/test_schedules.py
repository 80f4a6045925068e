"""Learning rates and the bi-level calendar."""

from __future__ import annotations

import pytest

from ray_dwm.core.schedules import BilevelSchedule, lr_factor

COMMON = {"total_steps": 100, "warmup_steps": 10, "min_ratio": 0.1, "decay_fraction": 0.2}


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ("cosine", 0, 0.1),
        ("cosine", 9, 1.0),
        ("cosine", 10, 1.0),
        ("cosine", 55, 0.55),
        ("cosine", 100, 0.1),
        ("wsd", 50, 1.0),
        ("wsd", 80, 1.0),
        ("wsd", 90, 0.55),
        ("wsd", 100, 0.1),
        ("constant", 99, 1.0),
    ],
)
def test_learning_rate(schedule: str, step: int, expected: float) -> None:
    assert lr_factor(step, schedule=schedule, **COMMON) == pytest.approx(expected)


@pytest.mark.parametrize(("every", "warmup", "delay"), [(1, 1, 0), (1, 3, 1), (3, 2, 1), (3, 2, 5), (10, 20, 1)])
def test_versions_follow_from_bilevel_steps(every: int, warmup: int, delay: int) -> None:
    schedule = BilevelSchedule(every=every, warmup_steps=warmup, delay_steps=delay)
    done = 0
    made_at: list[int] = []
    for step in range(60):
        assert schedule.updates_before(step) == done
        assert schedule.version(step) == sum(1 for s in made_at if step >= s + 1 + delay)
        if schedule.is_bilevel(step):
            made_at.append(step)
            done += 1
    assert made_at[0] == warmup
