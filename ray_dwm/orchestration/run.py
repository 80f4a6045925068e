"""A run of given data: what is checked before it starts, and who may write into its folder while it trains."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from ray_dwm.config import RunConfig, build, to_dict
from ray_dwm.data.manifest import Manifest
from ray_dwm.data.shards import open_shards
from ray_dwm.engine.checks import check_checkpoint, check_data
from ray_dwm.engine.rundir import check, claim, read_summary
from ray_dwm.engine.saved import newest_step
from ray_dwm.engine.stopping import stopped_by_sigterm
from ray_dwm.evaluation.taskfile import is_path
from ray_dwm.logs import bind, say
from ray_dwm.orchestration.cluster import connect
from ray_dwm.orchestration.evaluate import Evaluations, check_tasks
from ray_dwm.orchestration.fit import fit
from ray_dwm.orchestration.mirror import Mirror, prepare_mirror
from ray_dwm.orchestration.placement import await_resources, prove_storage


def run(config: RunConfig, train: Callable[[RunConfig, Manifest], dict[str, Any]] = fit) -> dict[str, Any]:
    """Run to the end, or continue an interrupted run of the same name; returns summary.json's content.

    Args:
        train: what trains, once all is checked and the folder claimed.

    Raises:
        UserError: before anything was started.
        Stopped: a SIGTERM came before it began, or went on.
        TrainingError: the run failed, or was stopped by a SIGTERM; the last checkpoint is intact.
    """
    manifest = check_data(config)
    for folder in (config.data.train, *config.data.evaluation_sets.values()):
        open_shards(folder).verify()
    config = absolute(config)
    prepare_mirror(config)
    check(config)
    done = read_summary(config)
    if done is not None:
        say(f"is complete already: {config.run_dir}", run=config.name)
        return done
    check_checkpoint(config, manifest)
    overlaps = check_tasks(config)
    connect(config)
    with ExitStack() as held:
        with stopped_by_sigterm(f"[{config.name}] {_stopped(config)}"):
            _await_place(config)
            held.enter_context(claim(config))
        held.enter_context(Mirror(config))
        say(f"run folder {config.run_dir}", run=config.name)
        bind(run=config.name)  # it stays where the run fails: what is said of that is of this run
        with Evaluations(config, overlaps) as evaluations:
            summary = train(config, manifest)
            evaluations.finish()
        bind(run=None)
        return summary


def _stopped(config: RunConfig) -> str:
    """What a stop comes to while a place is waited for."""
    step = newest_step(config.run_dir)
    if step is None:
        return "stopped before it began: the same command starts it"
    return f"stopped before it went on from step {step}: the same command continues"


def _await_place(config: RunConfig) -> None:
    workers = await_resources(config)
    if workers < config.cluster.most_workers:
        say(
            f"the cluster has room for {workers} of at most {config.cluster.most_workers} workers: the others join "
            "when nodes come",
            run=config.name,
        )
    prove_storage(config)


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
    group_dro = data["weighting"]["group_dro"]
    if group_dro["reference"]:
        group_dro["reference"] = str(Path(group_dro["reference"]).expanduser().absolute())
    data["evaluation"]["tasks"] = [
        str(Path(name).expanduser().absolute()) if is_path(name) else name for name in config.evaluation.tasks
    ]
    for section in ("more_targets", "held_out"):
        folders = data["data"][section]
        data["data"][section] = {k: str(Path(v).expanduser().absolute()) for k, v in folders.items()}
    resolved: RunConfig = build(RunConfig, data)
    return resolved
