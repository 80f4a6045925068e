"""How many trials a cluster holds at once, so that no group of workers ever waits for ever."""

from __future__ import annotations

from typing import Any

import pytest

from ray_dwm.config import load
from ray_dwm.orchestration.room import at_once, driver_resources

GPUS = ["cluster.gpus_per_worker=1", "cluster.cpus_per_worker=8", "train.global_batch=64"]


@pytest.mark.parametrize(
    ("nodes", "options", "expected"),
    [
        ([{"CPU": 3}], ["cluster.workers=1"], 1),
        ([{"CPU": 6}], ["cluster.workers=1"], 2),
        ([{"CPU": 8}], ["cluster.workers=2"], 2),
        ([{"CPU": 8}], ["cluster.workers=2", "weighting.method=uniform"], 2),
        ([{"CPU": 1}], ["cluster.workers=4"], 1),  # too small, which is checked elsewhere
        # An actor on a GPU node takes a CPU that the workers there do not need.
        ([{"CPU": 96, "GPU": 8}] * 4, ["cluster.workers=8", *GPUS], 4),
        # Here it takes the CPUs of one worker's place, so that one group would wait: one trial less.
        ([{"CPU": 64, "GPU": 8}] * 4, ["cluster.workers=8", *GPUS], 3),
        # Drivers and actors beside the GPU nodes still may not be told to stay there: the same.
        ([{"CPU": 64, "GPU": 8}] * 4 + [{"CPU": 16, "train_driver": 64}], ["cluster.workers=8", *GPUS], 3),
        ([{"CPU": 96, "GPU": 8}] * 4 + [{"CPU": 0, "train_driver": 2}], ["cluster.workers=8", *GPUS], 2),
        ([{"CPU": 96, "GPU": 8}] * 2, ["cluster.workers=7", "cluster.dwm_gpus=1", *GPUS], 1),
    ],
)
def test_as_many_trials_as_have_room_wherever_drivers_lie(
    nodes: list[dict[str, Any]], options: list[str], expected: int
) -> None:
    assert at_once(nodes, load([], options)) == expected


def test_drivers_stay_where_drivers_belong() -> None:
    assert driver_resources({"CPU": 8.0, "train_driver": 64.0}) == {"train_driver": 1.0}
    assert driver_resources({"CPU": 8.0}) == {"CPU": 0.01}
