"""One Ray Train run: a TorchTrainer of FSDP workers, fed by Ray Data, beside a DWM actor."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import TorchConfig, TorchTrainer

from ray_dwm import logs
from ray_dwm.config import RunConfig, build, to_dict
from ray_dwm.data.manifest import Manifest, load_manifest
from ray_dwm.data.records import read_metrics, write_whole
from ray_dwm.engine.clock import PHASES, overhead
from ray_dwm.engine.export import export_dwm, export_lm
from ray_dwm.engine.loop import Trainer
from ray_dwm.engine.mesh import BACKENDS, TIMEOUT_S, all_sum, device, init_mesh, is_main
from ray_dwm.engine.parts import Parts
from ray_dwm.engine.probe import newest_step
from ray_dwm.engine.rundir import failure_path, raise_failure, read_summary, record_failure, running_path, stop_path
from ray_dwm.engine.setup import build as build_parts
from ray_dwm.engine.setup import build_learner, read_plan
from ray_dwm.engine.stopping import on_sigterm
from ray_dwm.errors import DwmError, Stopped, TrainingError
from ray_dwm.orchestration.cluster import NAMESPACE, worker_environment
from ray_dwm.orchestration.dwm_actor import RemoteWeightService, actor_name, create_actor
from ray_dwm.orchestration.exporting import Exporter, RaySink, active, run_id
from ray_dwm.orchestration.ingest import RayDataSource
from ray_dwm.orchestration.progress import Progress
from ray_dwm.orchestration.tracking import sinks
from ray_dwm.orchestration.watch import Watch, first_failure, last_words, next_attempt

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

    Where none of them runs, as while resources are waited for, nobody would answer.

    Raises:
        KeyboardInterrupt: then, because Ray lets no other exception out of its waiting.
    """
    stop_path(config).touch()
    if not running_path(config).exists():
        raise KeyboardInterrupt


def _trainer(config: RunConfig, until: int, figures: Figures) -> TorchTrainer:
    cluster = config.cluster
    resources = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    return TorchTrainer(
        train_worker,
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


def train_worker(loop_config: dict[str, Any]) -> None:
    """What each worker of the group runs, from the newest checkpoint on."""
    config: RunConfig = build(RunConfig, loop_config["config"])
    if failure_path(config).exists():
        return  # an earlier attempt found that restarting does not help; the driver reports it
    init_mesh()
    rank, main = dist.get_rank(), is_main()
    attempt = int(all_sum(torch.tensor(next_attempt(config.run_dir) if main else 0, device=device())))
    logs.setup(logs.style_of(config.tracking.logs, worker=True))
    logs.bind(run=config.name, attempt=attempt, rank=rank, step=0)
    exporter = Exporter("worker", config.name, run_id(), str(rank))
    if main:
        running_path(config).touch()
        exporter.put("lm_restarts", attempt - 1)
    try:
        with Watch(config, attempt, rank, exporter) as watch:
            _watched(config, watch, lambda: _run(config, loop_config["until"], loop_config["figures"], exporter))
    finally:
        if main:
            running_path(config).unlink(missing_ok=True)


def _watched(config: RunConfig, watch: Watch, run: Callable[[], None]) -> None:
    """Run, and write down what ends it."""
    beat = watch.look()
    logs.record("the worker starts", node=beat.node, pid=beat.pid, workers=dist.get_world_size())
    try:
        run()
    except Stopped as stopped:
        record_failure(config, stopped)  # and end well: Ray Train would restart what fails
    except DwmError as error:
        record_failure(config, error, where=str(watch.failed(error)))
        raise
    except Exception as error:
        watch.failed(error)
        raise
    logs.record("the worker ends")


def _run(config: RunConfig, until: int, figures: Figures, exporter: Exporter) -> None:
    train_set = load_manifest(config.data.train)
    rank, world = dist.get_rank(), dist.get_world_size()
    source = RayDataSource(
        config.data.train,
        read_plan(config, train_set),
        rank,
        world,
        config.data.prefetch_batches,
        config.cluster.ingest_memory_mb,
    )
    service = None
    if config.learns_dwm:
        service = RemoteWeightService(ray.get_actor(actor_name(config), namespace=NAMESPACE))

    # Rank 0 alone: the others neither tell of checkpoints nor look for one that rank 0 may just be removing.
    exported = RaySink(config, exporter, lambda: service.queue if service is not None else 0) if rank == 0 else None

    def on_checkpoint(step: int, path: Path, figures: dict[str, float]) -> None:
        if exported is not None:
            exported.checkpoint(time.time())
            logs.record(f"checkpoint {path}", step=step)
        ray.train.report({"step": step, **figures})

    notice = PreemptionNotice()

    parts = build_parts(
        config,
        source=source,
        service=service,
        sinks=[] if exported is None else [exported, *sinks(config)],
        on_checkpoint=on_checkpoint,
        on_version=lambda step: export_dwm(parts, train_set, step),
        should_stop=lambda: rank == 0 and stop_path(config).exists(),
        preempted=notice.is_new,
        until=until,
        figures=figures,
    )
    trainer = Trainer(parts)
    trainer.fit()
    if until == config.train.steps:
        _complete(parts, train_set, trainer.evaluate())


def _complete(parts: Parts, train_set: Manifest, final: dict[str, float]) -> None:
    """What is done at a run's end, by all ranks together."""
    config = parts.config
    export_lm(parts, train_set)
    export_dwm(parts, train_set, config.train.steps)  # again: a kill after the last checkpoint may have prevented it
    if is_main():
        # Its presence says that the run is complete.
        summary = _summary(config, dist.get_world_size(), final)
        write_whole(config.run_dir / "summary.json", json.dumps(summary, indent=2) + "\n")


class PreemptionNotice:
    """Ray Train's word that a node of the group is about to be taken away."""

    def __init__(self) -> None:
        self._known: ray.train.PreemptionInfo | None = None

    def is_new(self) -> bool:
        """Whether there is one that was not there before; all ranks ask together and get rank 0's answer."""
        before, self._known = self._known, ray.train.get_preemption_info()
        return self._known is not None and self._known != before


def _summary(config: RunConfig, world: int, final: dict[str, float]) -> dict[str, Any]:
    lines = read_metrics(config.run_dir / "metrics.jsonl")
    last = lines[-1]
    fidelities = [line["dwm/fidelity"] for line in lines if "dwm/fidelity" in line]
    totals = {phase: sum(line.get(f"seconds/{phase}", 0.0) for line in lines) for phase in PHASES}
    return {
        "name": config.name,
        "weighting": config.weighting.method,
        "steps": config.train.steps,
        "tokens": last["tokens"],
        "workers": world,
        "train_seconds": last["time_s"],
        "tokens_per_s": last["tokens"] / last["time_s"],
        "overhead_frac": overhead(totals),
        "seconds": totals,
        **({"fidelity": median(fidelities)} if fidelities else {}),
        "final": final,
    }


def _reason(config: RunConfig, error: ray.train.TrainingFailedError) -> str:
    first = first_failure(config.run_dir, getattr(error, "worker_failures", None) or {}) or last_words(error)
    return (
        f"[{config.name}] gave up after {config.cluster.max_failures} restarts: {first}; start the same command again "
        "to continue from the last checkpoint"
    )
