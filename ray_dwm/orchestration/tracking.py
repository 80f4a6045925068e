"""Weights & Biases in rank 0, one run however often the worker group restarts."""

from __future__ import annotations

import os
from typing import Any

from ray_dwm.config import RunConfig, to_dict
from ray_dwm.engine.metrics import Metrics, MetricSink


class WandbSink:
    """Logs every step's figures against tokens."""

    def __init__(self, config: RunConfig, mode: str) -> None:
        import wandb

        self._run: Any = wandb.init(
            project=config.tracking.project,
            group=config.tracking.group or None,
            job_type="pretrain",
            name=config.name,
            id=config.name,
            resume="allow",
            config=to_dict(config),
            mode=mode,
            dir=str(config.run_dir),
            settings=wandb.Settings(silent=True),
        )
        self._run.define_metric("*", step_metric="tokens")

    def log(self, metrics: Metrics) -> None:
        """See MetricSink."""
        self._run.log(dict(metrics), step=int(metrics["step"]))

    def close(self, exit_code: int) -> None:
        """See MetricSink."""
        self._run.finish(exit_code=exit_code)


def sinks(config: RunConfig) -> list[MetricSink]:
    """The tracking that the configuration asks for."""
    mode = config.tracking.wandb
    if mode == "off":
        return []
    if mode == "auto":
        mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
    return [WandbSink(config, mode)]
