"""The main job: a TorchTrainer of FSDP workers, fed by Ray Data, beside a DWM actor."""

from __future__ import annotations

import json
import os
from pathlib import Path
from statistics import median
from typing import Any

import ray
import ray.train
import torch.distributed as dist
from ray.train.torch import TorchConfig, TorchTrainer

from ray_dwm.config import RunConfig, build, to_dict
from ray_dwm.data.manifest import Manifest, load_manifest
from ray_dwm.data.records import read_metrics, write_whole
from ray_dwm.data.shards import open_shards
from ray_dwm.engine.clock import PHASES, overhead
from ray_dwm.engine.export import export_dwm, export_lm
from ray_dwm.engine.loop import Trainer
from ray_dwm.engine.mesh import BACKENDS, TIMEOUT_S, init_mesh, is_main
from ray_dwm.engine.rundir import (
    check,
    claim,
    failure_path,
    raise_failure,
    read_summary,
    record_failure,
    running_path,
    stop_path,
)
from ray_dwm.engine.setup import build as build_parts
from ray_dwm.engine.setup import build_learner, check_checkpoint, check_data, evaluation_sets, read_plan
from ray_dwm.engine.stopping import on_sigterm
from ray_dwm.errors import DwmError, Stopped, TrainingError
from ray_dwm.orchestration.cluster import NAMESPACE, connect, preflight, worker_environment
from ray_dwm.orchestration.dwm_actor import RemoteWeightService, actor_name, create_actor
from ray_dwm.orchestration.ingest import RayDataSource
from ray_dwm.orchestration.prepare import prepare_sets
from ray_dwm.orchestration.progress import Progress
from ray_dwm.orchestration.select import with_selection
from ray_dwm.orchestration.tracking import sinks


def train(config: RunConfig) -> dict[str, Any]:
    """Run to the end, or continue an interrupted run of the same name; returns summary.json's content.

    Raises:
        UserError: before anything was started.
        TrainingError: the run failed, or was stopped by a SIGTERM; the last checkpoint is intact.
    """
    warn_of_temporary_storage(config)
    prepare_sets(config, missing_only=True)
    config = with_selection(config)
    manifest = check_data(config)
    for folder in (config.data.train, *evaluation_sets(config).values()):
        open_shards(folder).verify()
    config = absolute(config)
    check(config)
    done = read_summary(config)
    if done is not None:
        print(f"[{config.name}] is complete already: {config.run_dir}", flush=True)
        return done
    check_checkpoint(config, manifest)
    connect(config)
    workers = preflight(config)
    if workers < config.cluster.most_workers:
        print(
            f"[{config.name}] the cluster has room for {workers} of at most {config.cluster.most_workers} workers: the "
            "others join when nodes come",
            flush=True,
        )
    with claim(config):
        print(f"[{config.name}] run folder {config.run_dir}", flush=True)
        return _fit(config, manifest)


def _fit(config: RunConfig, manifest: Manifest) -> dict[str, Any]:
    actor = create_actor(config, build_learner(config, manifest)) if config.learns_dwm else None
    try:
        with on_sigterm(lambda: _ask_to_stop(config)), Progress(config):
            _trainer(config).fit()
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
    summary = read_summary(config)
    if summary is None:
        raise TrainingError(f"[{config.name}] ended without a summary: look into the workers' logs of Ray Train")
    return summary


def _ask_to_stop(config: RunConfig) -> None:
    """A stopped job, a deleted pod: the workers cannot take the signal, so they are asked by a file.

    Where none of them runs, as while resources are waited for, nobody would answer.

    Raises:
        KeyboardInterrupt: then, because Ray lets no other exception out of its waiting.
    """
    stop_path(config).touch()
    if not running_path(config).exists():
        raise KeyboardInterrupt


def _trainer(config: RunConfig) -> TorchTrainer:
    cluster = config.cluster
    resources = {"CPU": cluster.cpus_per_worker}
    if cluster.gpus_per_worker:
        resources["GPU"] = cluster.gpus_per_worker
    return TorchTrainer(
        train_worker,
        train_loop_config={"config": to_dict(config)},
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
    """What each worker of the group runs, from the newest checkpoint to the end."""
    config: RunConfig = build(RunConfig, loop_config["config"])
    if failure_path(config).exists():
        return  # an earlier attempt found that restarting does not help; the driver reports it
    if is_main():
        running_path(config).touch()
    try:
        _run(config)
    except Stopped as stopped:
        record_failure(config, stopped)  # and end well: Ray Train would restart what fails
    except DwmError as error:
        record_failure(config, error)
        raise
    finally:
        if is_main():
            running_path(config).unlink(missing_ok=True)


def _run(config: RunConfig) -> None:
    init_mesh()
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

    def on_checkpoint(step: int, path: Path, figures: dict[str, float]) -> None:
        del path
        ray.train.report({"step": step, **figures})

    notice = PreemptionNotice()

    parts = build_parts(
        config,
        source=source,
        service=service,
        sinks=sinks(config) if rank == 0 else [],
        on_checkpoint=on_checkpoint,
        on_version=lambda step: export_dwm(parts, train_set, step),
        should_stop=lambda: rank == 0 and stop_path(config).exists(),
        preempted=notice.is_new,
    )
    trainer = Trainer(parts)
    trainer.fit()
    final = trainer.evaluate()
    export_lm(parts, train_set)
    export_dwm(parts, train_set, config.train.steps)  # again: a kill after the last checkpoint may have prevented it
    if rank == 0:
        # Its presence says that the run is complete.
        write_whole(config.run_dir / "summary.json", json.dumps(_summary(config, world, final), indent=2) + "\n")


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
    failures = getattr(error, "worker_failures", None) or {}
    cause: BaseException = next(iter(failures.values()), error)
    lines = [line for line in str(cause).strip().splitlines() if line.strip()] or [type(cause).__name__]
    return (
        f"[{config.name}] gave up after {config.cluster.max_failures} restarts: {lines[-1].strip()}; start the same "
        "command again to continue from the last checkpoint"
    )


def absolute(config: RunConfig) -> RunConfig:
    """Paths as every process of the cluster must see them."""
    data = to_dict(config)
    data["storage"] = str(config.run_dir.parent)
    for name in ("train", "target"):
        if data["data"][name]:
            data["data"][name] = str(Path(data["data"][name]).expanduser().absolute())
    for name in ("init_from", "trajectory"):
        if data["dwm"][name]:
            data["dwm"][name] = str(Path(data["dwm"][name]).expanduser().absolute())
    for section in ("more_targets", "held_out"):
        folders = data["data"][section]
        data["data"][section] = {k: str(Path(v).expanduser().absolute()) for k, v in folders.items()}
    resolved: RunConfig = build(RunConfig, data)
    return resolved


def warn_of_temporary_storage(config: RunConfig) -> None:
    """Say that a relative storage goes with a Ray job's temporary working folder."""
    if storage_is_temporary(config):
        print(
            f"warning: storage={config.storage} is relative, and a Ray job's working folder is temporary: pass "
            "storage=/a/shared/folder to keep the run and to be able to resume it",
            flush=True,
        )


def storage_is_temporary(config: RunConfig) -> bool:
    """Whether the run folder would lie in a Ray job's working folder."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and not Path(config.storage).expanduser().is_absolute()
