"""What each worker of a run's group does: the engine's loop, fed by Ray Data and told of by Ray Train."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.train.v2._internal.execution.context import get_train_context

from ray_dwm import logs
from ray_dwm.config import RunConfig, build
from ray_dwm.data.manifest import Manifest, load_manifest
from ray_dwm.data.records import read_metrics, write_whole
from ray_dwm.engine.checks import read_plan
from ray_dwm.engine.clock import PHASES, overhead
from ray_dwm.engine.export import export_dwm, export_lm
from ray_dwm.engine.loop import Trainer
from ray_dwm.engine.mesh import all_sum, device, init_mesh, is_main
from ray_dwm.engine.parts import Parts
from ray_dwm.engine.rundir import failure_path, record_failure, running_path, stop_path
from ray_dwm.engine.setup import build as build_parts
from ray_dwm.errors import DwmError, Stopped
from ray_dwm.orchestration.cluster import NAMESPACE
from ray_dwm.orchestration.dwm_actor import RemoteWeightService, actor_name
from ray_dwm.orchestration.exporting import Exporter, RaySink
from ray_dwm.orchestration.fit import Figures
from ray_dwm.orchestration.ingest import RayDataSource
from ray_dwm.orchestration.tracking import sinks
from ray_dwm.orchestration.watch import Watch, next_attempt


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
    try:
        run_id = get_train_context().train_run_context.run_id  # Ray Train's: another one for every start of the command
        with Exporter("worker", config.name, run_id, str(rank)) as exporter:
            if main:
                running_path(config).touch()
                exporter.put("lm_restarts", attempt - 1)
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
