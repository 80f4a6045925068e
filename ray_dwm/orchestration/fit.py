"""One Ray Train run: a TorchTrainer of FSDP workers, fed by Ray Data, beside a DWM actor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer

from ray_dwm.config import RunConfig, to_dict
from ray_dwm.data.manifest import Manifest
from ray_dwm.engine.given import build_learner
from ray_dwm.engine.mesh import BACKENDS, TIMEOUT_S
from ray_dwm.engine.rundir import raise_failure, read_summary, running_path, stop_path
from ray_dwm.engine.saved import newest_step
from ray_dwm.engine.stopping import on_sigterm
from ray_dwm.errors import Stopped, TrainingError
from ray_dwm.orchestration.cluster import worker_environment
from ray_dwm.orchestration.dwm_actor import create_actor
from ray_dwm.orchestration.exporting import active
from ray_dwm.orchestration.progress import Progress
from ray_dwm.orchestration.watch import first_failure, is_beating, last_words

Figures = Mapping[int, Mapping[str, float]]
"""Step -> what its line of metrics.jsonl says besides."""


def fit(config: RunConfig, manifest: Manifest, figures: Figures | None = None) -> dict[str, Any]:
    """Train a run whose folder is claimed to its end; returns summary.json's content.

    Raises:
        TrainingError: it failed, or was stopped by a SIGTERM; the last checkpoint is intact.
    """
    fit_until(config, manifest, config.train.steps, figures or {})
    summary = read_summary(config)
    if summary is None:
        raise TrainingError(f"[{config.name}] ended without a summary: look into the workers' logs of Ray Train")
    return summary


def fit_until(config: RunConfig, manifest: Manifest, until: int, figures: Figures) -> None:
    """Train up to a step, and save a checkpoint there; what is done at a run's end is left to its last step.

    Raises:
        TrainingError: it failed, or was stopped by a SIGTERM; the last checkpoint is intact.
    """
    with active(config):
        _fit_until(config, manifest, until, figures)


def _fit_until(config: RunConfig, manifest: Manifest, until: int, figures: Figures) -> None:
    actor = create_actor(config, build_learner(config, manifest)) if config.learns_dwm else None
    try:
        with on_sigterm(lambda: _ask_to_stop(config)), Progress(config):
            _trainer(config, until, figures).fit()
    except KeyboardInterrupt:
        if not stop_path(config).exists():
            raise
        raise Stopped(f"[{config.name}] stopped while no worker ran: the same command continues") from None
    except ray.train.TrainingFailedError as error:
        raise_failure(config)
        raise TrainingError(_reason(config, error)) from None
    finally:
        if actor is not None:
            ray.kill(actor)
    raise_failure(config)
    if (newest_step(config.run_dir) or 0) < until:
        raise TrainingError(f"[{config.name}] ended before step {until}: look into the workers' logs of Ray Train")


def _ask_to_stop(config: RunConfig) -> None:
    """A stopped job, a deleted pod: the workers cannot take the signal, so they are asked by a file.

    Where none of them runs, as while nodes are waited for or after a kill, nobody would answer.

    Raises:
        KeyboardInterrupt: then, because Ray lets no other exception out of its waiting.
    """
    stop_path(config).touch()
    if not (running_path(config).exists() and is_beating(config.run_dir)):
        raise KeyboardInterrupt


def _trainer(config: RunConfig, until: int, figures: Figures) -> TorchTrainer:
    cluster = config.cluster
    resources = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    return TorchTrainer(
        _train_worker,
        train_loop_config={"config": to_dict(config), "until": until, "figures": figures},
        torch_config=TorchConfig(
            backend=BACKENDS["cuda" if cluster.gpus_per_worker else "cpu"], timeout_s=int(TIMEOUT_S)
        ),
        scaling_config=ray.train.ScalingConfig(
            num_workers=cluster.workers if cluster.elastic else cluster.most_workers,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker=resources,
        ),
        # The same name again resumes: never a dated one.
        run_config=ray.train.RunConfig(
            name=config.name,
            storage_path=str(config.run_dir.parent),
            failure_config=ray.train.FailureConfig(max_failures=cluster.max_failures),
            worker_runtime_env={"env_vars": worker_environment(config)},
        ),
    )


def _train_worker(loop_config: dict[str, Any]) -> None:
    # Imported where it runs: the driver and Ray Train's controller need neither transformers nor the engine.
    from ray_dwm.orchestration.worker import train_worker

    train_worker(loop_config)


def _reason(config: RunConfig, error: ray.train.TrainingFailedError) -> str:
    first = first_failure(config.run_dir, getattr(error, "worker_failures", None) or {}) or last_words(error)
    return (
        f"[{config.name}] gave up after {config.cluster.max_failures} restarts: {first}; start the same command again "
        "to continue from the last checkpoint"
    )
