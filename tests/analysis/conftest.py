"""Fixtures of the tests of analysis."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic_experiment import begun

from ray_dwm.config.experiment import ExperimentConfig


@pytest.fixture
def experiment(shards: dict[str, Path], tmp_path: Path) -> ExperimentConfig:
    """An experiment of which nothing has been run."""
    return begun(shards, tmp_path)
