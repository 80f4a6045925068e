"""The DWM that a run starts from: a fresh one, or that of `dwm.init_from`."""

from __future__ import annotations

from pathlib import Path

from ray_dwm.config import RunConfig
from ray_dwm.data.manifest import Manifest
from ray_dwm.engine.learner import DwmLearner
from ray_dwm.errors import ConfigError
from ray_dwm.models.dwm import DwmShape, dwm_shape
from ray_dwm.models.folders import load_dwm


def build_learner(config: RunConfig, train: Manifest) -> DwmLearner:
    """The upper level's learner at version 0."""
    learner = DwmLearner(run_dwm_shape(config, train), config.dwm, config.bilevel, config.seed)
    if config.dwm.init_from:
        given, _ = load_dwm(Path(config.dwm.init_from).expanduser(), train.tokenizer_sha256)
        if given.shape != learner.model.shape:
            raise ConfigError(
                f"dwm.init_from={config.dwm.init_from} is of another architecture ({given.shape}): set dwm.size, "
                "dwm.lm_features and dwm.batch_attention to it"
            )
        learner.model.load_state_dict(given.state_dict())
    return learner


def run_dwm_shape(config: RunConfig, train: Manifest) -> DwmShape:
    """The DWM's architecture in a run."""
    return dwm_shape(config.dwm.size, train.vocab_size, config.dwm.lm_features, config.dwm.batch_attention)
