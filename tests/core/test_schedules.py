"""Learning rates and the bi-level calendar."""

from __future__ import annotations

import pytest

from ray_dwm.core.schedules import BilevelSchedule, EveryN, Staged, lr_factor

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


def follow(schedule: BilevelSchedule, steps: int = 60) -> list[int]:
    """The bi-level steps; checks that counts and versions follow from them."""
    made_at: list[int] = []
    for step in range(steps):
        assert schedule.updates_before(step) == len(made_at)
        version = schedule.version(step)
        assert version == sum(1 for s in made_at if step >= s + 1 + schedule.delay_steps)
        assert schedule.staleness(step) == step - (made_at[version - 1] if version else 0)
        if schedule.is_bilevel(step):
            made_at.append(step)
    return made_at


@pytest.mark.parametrize(("every", "warmup", "delay"), [(1, 1, 0), (1, 3, 1), (3, 2, 1), (3, 2, 5), (10, 20, 1)])
def test_every_n(every: int, warmup: int, delay: int) -> None:
    schedule = EveryN(every=every, warmup_steps=warmup, delay_steps=delay)
    assert follow(schedule) == list(range(warmup, 60, every))


@pytest.mark.parametrize(("last", "every", "expected"), [(12, 3, [2, 12, 15, 18, 21]), (12, 15, [2, 12, 27, 42])])
def test_n_may_change_after_a_bilevel_step(last: int, every: int, expected: list[int]) -> None:
    schedule = EveryN(every=10, warmup_steps=2, delay_steps=2, changing=True)
    schedule.change(last, every)
    assert follow(schedule)[: len(expected)] == expected


@pytest.mark.parametrize(
    ("stages", "updates", "expected"),
    [(1, 3, [4, 5, 6]), (2, 2, [4, 5, 32, 33]), (4, 1, [4, 18, 32, 46])],
)
def test_stages(stages: int, updates: int, expected: list[int]) -> None:
    common = {"stages": stages, "updates": updates, "total_steps": 60, "warmup_steps": 4, "delay_steps": 1}
    assert follow(Staged(**common)) == expected
    starts = expected[::updates]
    assert [Staged(**common).stage(step) for step in (0, *starts, 59)] == [0, *range(1, stages + 1), stages]
    held = Staged(**common, hold=True)
    assert [step for step in range(60) if held.holds(step)] == expected
    assert not any(Staged(**common).holds(step) for step in range(60))
