"""What a budget buys, against the arithmetic done by hand."""

from __future__ import annotations

import pytest

from ray_dwm.core.budget import RAREST, Costs, choose


@pytest.mark.parametrize(
    ("costs", "limit", "expected"),
    [
        # Room a step: 0.05 - 0.01 = 0.04. A bi-level step: 0.04 + 16 * 0.01 = 0.2, so every 5th.
        ((1.0, 0.01, 0.04, 0.01), 0.05, (5, 16)),
        # 0.9 / 0.04 gives 23: the target batch is halved, 0.5 / 0.04 gives 13, and 8 is the least.
        ((1.0, 0.01, 0.1, 0.05), 0.05, (13, 8)),
        # 0.26 / 0.04 gives 7: halved once, 0.18 / 0.04 gives 5.
        ((1.0, 0.01, 0.1, 0.01), 0.05, (5, 8)),
        # Everything is cheap: every step.
        ((1.0, 0.0, 0.01, 0.001), 0.05, (1, 16)),
        # The DWM's forward alone is over the budget.
        ((1.0, 0.06, 0.1, 0.01), 0.05, (RAREST, 8)),
    ],
)
def test_choice(costs: tuple[float, ...], limit: float, expected: tuple[int, int]) -> None:
    plain, always, fixed, target = costs
    measured = Costs(plain=plain, always=always, fixed=fixed, target_sequence=target)
    choice = choose(measured, limit, most=16, unit=2)
    assert (choice.every, choice.target_batch) == expected
    assert choice.overhead <= limit or always > limit


def test_target_batches_keep_to_their_unit() -> None:
    costs = Costs(plain=1.0, always=0.0, fixed=0.1, target_sequence=0.1)
    assert choose(costs, 0.05, most=36, unit=12).target_batch == 12
