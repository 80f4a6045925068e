"""The main job: prepare the data, select from them, train."""

from __future__ import annotations

from typing import Any

from ray_dwm.config import RunConfig
from ray_dwm.engine.checks import check_data
from ray_dwm.orchestration.cluster import warn_if_temporary
from ray_dwm.orchestration.mates import check_stages, fit_stages
from ray_dwm.orchestration.prepare import prepare_sets
from ray_dwm.orchestration.run import run
from ray_dwm.orchestration.select import with_selection


def train(config: RunConfig) -> dict[str, Any]:
    """Run to the end, or continue an interrupted run of the same name; returns summary.json's content.

    Raises:
        UserError: before anything was started.
        TrainingError: the run failed, or was stopped by a SIGTERM; the last checkpoint is intact.
    """
    warn_if_temporary("storage", config.storage)
    prepare_sets(config, missing_only=True)
    config = with_selection(config)
    if not config.in_stages:
        return run(config)
    check_stages(config, check_data(config))
    return run(config, fit_stages)
