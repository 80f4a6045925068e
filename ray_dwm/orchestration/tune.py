"""A sweep as a job: a search by Ray Tune and Optuna at the first scale, its winners at the others, and the report.

Every trial is a Ray Train run in a folder of its own, started by a driver that Tune places. The study in Optuna's
storage is the sweep's memory: what has ended is never run again, what was interrupted goes on from its checkpoint.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import ray
import yaml
from ray import tune as ray_tune
from ray.tune.schedulers import ASHAScheduler

from ray_dwm.analysis.tuning import Row, Trial, best, done, finished
from ray_dwm.config import RunConfig, to_dict
from ray_dwm.config.experiment import grid
from ray_dwm.config.tune import TuneConfig, probes, scale_config, values_of
from ray_dwm.data.manifest import MANIFEST, Manifest
from ray_dwm.data.records import alone_in, write_whole
from ray_dwm.engine.checks import check_data
from ray_dwm.engine.rundir import check as check_folder
from ray_dwm.engine.stopping import on_sigterm
from ray_dwm.errors import ConfigError, DataError, Stopped, TrainingError, UserError
from ray_dwm.logs import say
from ray_dwm.orchestration.cells import tokens
from ray_dwm.orchestration.cluster import alive_nodes, connect, warn_if_temporary
from ray_dwm.orchestration.evaluate import check_tasks
from ray_dwm.orchestration.experiment import experiment, make_ready
from ray_dwm.orchestration.experiment_checks import check as check_experiment
from ray_dwm.orchestration.experiment_checks import largest, refuse_mirror
from ray_dwm.orchestration.prepare import prepare_sets, sets_to_make
from ray_dwm.orchestration.promotion import Dwms, dwms_at, dwms_of, promoted, rows_of
from ray_dwm.orchestration.room import at_once, driver_resources
from ray_dwm.orchestration.run import absolute
from ray_dwm.orchestration.study import TRIALS, check_study, history, in_use, left, open_study, searcher
from ray_dwm.orchestration.trial import STATE_TRACKING, curve, run_trial
from ray_dwm.orchestration.tune_progress import Progress
from ray_dwm.orchestration.tune_report import Found, Stage, write_report

_STATE = "tune"
"""Folder of what Tune itself writes: TensorBoard files, and states that are never read again."""


@dataclass(frozen=True)
class Checked:
    """A sweep that was checked."""

    config: TuneConfig
    bases: dict[str, RunConfig]
    """Scale -> its run."""
    probes: list[RunConfig]
    """Runs of the first scale at the ends of the space."""


def check(config: TuneConfig, *, prepare: bool = True) -> Checked:
    """Check all that can be checked before a cluster is asked for anything but missing data.

    Args:
        prepare: make data that are missing; otherwise what needs them is not checked.

    Raises:
        UserError: naming the key, file or folder and the remedy.
    """
    bases = {scale: scale_config(config, scale) for scale in config.scales}
    found = Checked(config, bases, probes(config, bases[config.first]))
    for scale, run in bases.items():
        refuse_mirror(run)
        if config.measure not in run.data.evaluation_sets:
            sets = ", ".join(run.data.evaluation_sets) or "none"
            raise ConfigError(f"measure is {config.measure!r}, and scale {scale} has no such evaluation set: {sets}")
        if prepare and sets_to_make(run, missing_only=True):
            connect(largest(list(bases.values())))
            prepare_sets(run, missing_only=True)
    there = {scale: run for scale, run in bases.items() if prepare or _is_prepared(run)}
    _check_tokenizers(config, {scale: check_data(run) for scale, run in there.items()})
    for run in there.values():
        for probe in probes(config, run):
            check_data(probe)
    if config.first in there:
        _check_asha(config, there[config.first])
    for scale in list(config.scales)[1:]:
        declared = promoted(config, scale, [], {})  # what is promoted is not known yet, the controls are
        if scale in there:
            check_experiment(declared, grid(declared))
    check_study(config, bases[config.first])
    check_folder(bases[config.first])
    if prepare and not config.folder.exists():  # a task that is refused would fail every trial
        check_tasks(bases[config.first])
    return found


def _is_prepared(run: RunConfig) -> bool:
    folders = (run.data.train, *run.data.evaluation_sets.values())
    return all((Path(folder).expanduser() / MANIFEST).is_file() for folder in folders)


def _check_tokenizers(config: TuneConfig, manifests: Mapping[str, Manifest]) -> None:
    for scale, manifest in manifests.items():
        first = next(iter(manifests))
        if manifest.tokenizer_sha256 != manifests[first].tokenizer_sha256:
            raise DataError(
                f"scale {scale} was prepared with tokenizer {manifest.tokenizer_name}, scale {first} with "
                f"{manifests[first].tokenizer_name}, another one: a DWM of sweep {config.name} could not go from one "
                "to the other, prepare both with the same"
            )


def _check_asha(config: TuneConfig, run: RunConfig) -> None:
    if config.asha.grace_tokens >= tokens(run):
        raise ConfigError(
            f"asha.grace_tokens is {config.asha.grace_tokens}, and a trial trains on {tokens(run)} tokens: lower it, "
            "or set it to 0 to end none early"
        )


def tune(config: TuneConfig) -> Found:
    """Run a sweep to its end, or continue it, and write its report.

    Raises:
        UserError: before anything was started.
        Stopped: interrupted; the same command continues.
        TrainingError: no trial could be trained, or promoted runs have failed.
    """
    warn_if_temporary("storage", config.storage)
    if "RAY_ADDRESS" in os.environ:  # a cluster of our own has no dashboard
        os.environ.setdefault(STATE_TRACKING, "1")
    plan = check(config)
    folder = config.folder
    connect(largest([*plan.bases.values(), *plan.probes]), max(1, config.concurrent))
    device = make_ready([*plan.bases.values(), *plan.probes])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"sweep folder {folder} cannot be made ({error.strerror}): choose another storage=..."
        ) from None
    with alone_in(folder, "sweep"):
        write_whole(folder / "tune.yaml", yaml.safe_dump(values_of(config), sort_keys=False))
        base = plan.bases[config.first]
        study = open_study(config, base)
        trials = history(config, study)
        if left(config, trials):
            _search(plan, study, trials)
            trials = history(config, study)
        if left(config, trials):
            raise Stopped(
                f"sweep {config.name} interrupted, {len(finished(trials))} of {config.total} trials have ended: the "
                "same command continues"
            )
        if not done(trials):
            reason = next((trial.reason for trial in trials if trial.reason), "all were ended early")
            raise TrainingError(f"sweep {config.name}: no trial was trained to its end ({reason})")
        stages, failed = _promote(plan, trials)
        found = write_report(config, trials, stages, device)
    if failed:
        raise TrainingError(f"sweep {config.name}: {failed}; the report is {found.folder / 'report.md'}")
    return found


def concurrency(config: TuneConfig, runs: Sequence[RunConfig]) -> int:
    """Trials of these runs at once: as many as the cluster has room for, and at most those that are asked for."""
    nodes = [node["Resources"] for node in alive_nodes()]
    room = min(at_once(nodes, run) for run in runs)
    if config.concurrent > room:
        say(f"concurrent is {config.concurrent}, the cluster has room for {room} at once", run=config.name)
    return min(room, config.concurrent or room)


def _search(plan: Checked, study: optuna.Study, before: Sequence[Trial]) -> None:
    """Let Tune run what is left; what it is told is in the study."""
    config, base = plan.config, absolute(plan.bases[plan.config.first])
    parallel, number = concurrency(config, [base, *plan.probes]), left(config, list(before))
    told = f"{config.total} trials, {config.total - number} have ended, {parallel} at once: {config.folder}"
    say(told, run=config.name)
    driver = ray_tune.PlacementGroupFactory([driver_resources(ray.cluster_resources())])
    trainable = ray_tune.with_parameters(
        run_trial,
        base=to_dict(base),
        trials=config.folder / TRIALS,
        measure=config.measure,
        tracked=STATE_TRACKING in os.environ,
    )
    scheduler = None
    if config.asha.grace_tokens:
        scheduler = Asha(
            time_attr="tokens",
            metric="loss",
            mode="min",
            grace_period=config.asha.grace_tokens,
            max_t=tokens(base),
            reduction_factor=config.asha.reduction,
        )
        for trial in finished(before):
            path = config.folder / TRIALS / trial.id / "metrics.jsonl"
            scheduler.remember(trial.id, curve(path, f"val/{config.measure}/loss"))
    tuner = ray_tune.Tuner(
        ray_tune.with_resources(trainable, driver),
        tune_config=ray_tune.TuneConfig(
            search_alg=searcher(config, study),
            scheduler=scheduler,
            num_samples=number,
            max_concurrent_trials=parallel,
            # A driver that is to end early goes on training until its process has ended.
            reuse_actors=scheduler is None,
            trial_dirname_creator=_folder_name,
        ),
        run_config=ray_tune.RunConfig(
            name=_STATE,
            storage_path=str(config.folder),
            failure_config=ray_tune.FailureConfig(max_failures=config.retries),
            callbacks=[Progress(config.name, list(config.space), config.total, finished(before))],
            verbose=0,
        ),
    )
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # what failed is said by us, in one line
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    with in_use(config), on_sigterm(lambda: os.kill(os.getpid(), signal.SIGINT)):  # which Tune takes as a request
        tuner.fit()


class Asha(ASHAScheduler):
    """Ends no control early, for all else is held against them, and can be told what had ended before."""

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """See TrialScheduler; what controls report counts for the others."""
        decision: str = super().on_trial_result(tune_controller, trial, result)
        return self.CONTINUE if trial.config["control"] else decision

    def remember(self, trial: str, points: Iterable[Mapping[str, Any]]) -> None:
        """Take the curve of a trial that has ended: a sweep that is continued holds others against it too."""
        ended = SimpleNamespace(trial_id=trial, config={"control": ""})
        self.on_trial_add(None, ended)
        for point in points:
            self.on_trial_result(None, ended, dict(point))
        self.on_trial_remove(None, ended)


def _folder_name(trial: Any) -> str:
    return f"{trial.config['folder']}-{trial.trial_id}"


def _promote(plan: Checked, trials: Sequence[Trial]) -> tuple[list[Stage], str]:
    """Train the best settings and the controls at each further scale; returns what was found, and what failed."""
    config, stages, failed = plan.config, [], ""
    chosen = best(trials, config.promote, config.max_overhead)
    dwms: Dwms = dwms_of(config, chosen)
    for scale in list(config.scales)[1:]:
        declared = promoted(config, scale, chosen, dwms)
        at = concurrency(config, [plan.bases[scale]])
        try:
            experiment(declared, grid(declared), parallel=at)
        except TrainingError as error:  # what is done is worth a report
            failed = str(error)
        rows = rows_of(config, declared, chosen)
        stages.append(Stage(scale, rows, dwms))
        chosen = _chosen_again(config, rows, chosen)
        dwms = dwms_at(declared, chosen)
    return stages, failed


def _chosen_again(config: TuneConfig, rows: Sequence[Row], chosen: Sequence[Trial]) -> list[Trial]:
    by_id = {trial.id: trial for trial in chosen}
    learnt = [row for row in rows if row.how == "learn" and row.trial in by_id]
    within = [row for row in learnt if not config.max_overhead or row.overhead <= config.max_overhead]
    return [by_id[row.trial] for row in within[: config.promote]]
