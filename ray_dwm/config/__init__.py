"""What a run is made from: its sections, files and overrides; on top of it, experiments and sweeps."""

from ray_dwm.config.building import build
from ray_dwm.config.run import RunConfig, load, to_dict, to_yaml
from ray_dwm.config.sections import (
    CheckpointConfig,
    ClusterConfig,
    DataConfig,
    EvaluationConfig,
    LmConfig,
    ParallelConfig,
    PrepareConfig,
    TrackingConfig,
    TrainConfig,
)
from ray_dwm.config.selection import SelectionConfig
from ray_dwm.config.weighting import BilevelConfig, DwmConfig, WeightingConfig

__all__ = [
    "BilevelConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "DataConfig",
    "DwmConfig",
    "EvaluationConfig",
    "LmConfig",
    "ParallelConfig",
    "PrepareConfig",
    "RunConfig",
    "SelectionConfig",
    "TrackingConfig",
    "TrainConfig",
    "WeightingConfig",
    "build",
    "load",
    "to_dict",
    "to_yaml",
]
