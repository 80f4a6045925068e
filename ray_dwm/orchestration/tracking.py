"""Weights & Biases in rank 0, one run however often the worker group restarts."""

from __future__ import annotations

import os
import uuid
from typing import Any

from ray_dwm.config import RunConfig, to_dict
from ray_dwm.data.records import write_whole
from ray_dwm.engine.metrics import Metrics, MetricSink
from ray_dwm.errors import TrainingError


class WandbSink:
    """Logs every step's figures against tokens."""

    def __init__(self, config: RunConfig, mode: str) -> None:
        import wandb

        try:
            self._run: Any = wandb.init(
                project=config.tracking.project,
                group=config.tracking.group or None,
                job_type="pretrain",
                name=config.name,
                id=_run_id(config),
                resume="allow",
                config=to_dict(config),
                mode=mode,
                dir=str(config.run_dir),
                settings=wandb.Settings(silent=True),
            )
        except wandb.Error as error:
            raise TrainingError(
                f"W&B cannot be reached ({str(error).splitlines()[0]}): set tracking.wandb=offline and sync later"
            ) from None
        self._run.define_metric("*", step_metric="tokens")

    def log(self, metrics: Metrics) -> None:
        """See MetricSink."""
        self._run.log(dict(metrics), step=int(metrics["step"]))

    def close(self, exit_code: int) -> None:
        """See MetricSink."""
        self._run.finish(exit_code=exit_code)


def _run_id(config: RunConfig) -> str:
    """An id of this run folder's own: a restart continues its W&B run, another run of the same name does not."""
    path = config.run_dir / "wandb_id"
    if not path.exists():
        write_whole(path, uuid.uuid4().hex[:12])
    return path.read_text()


def sinks(config: RunConfig) -> list[MetricSink]:
    """The tracking that the configuration asks for."""
    mode = config.tracking.wandb
    if mode == "off":
        return []
    if mode == "auto":
        mode = "online" if os.environ.get("WANDB_API_KEY") else "offline"
    return [WandbSink(config, mode)]
