"""A run that chooses its own data: stages of training, between which the current LM says what it needs next.

A stage trains on rows of the pool that lie in `stages/<number>/` of the run folder. The first stage's are random; for
every other one, probes, influence model and scores are made from the checkpoint that ends the stage before it, on Ray
Data and in blocks that survive an interruption. All of it follows from the run folder: whenever the same command is
started again, it goes on where the last one was.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ray_dwm.config import RunConfig, to_dict
from ray_dwm.data.manifest import Manifest
from ray_dwm.data.records import read_json, write_whole
from ray_dwm.data.stages import ROWS, Stage, chosen_rows, cut, stage_folder
from ray_dwm.engine.checks import seq_len
from ray_dwm.engine.messages import say
from ray_dwm.engine.rundir import stop_path
from ray_dwm.engine.saved import newest_step
from ray_dwm.errors import ConfigError, DataError, Stopped, TrainingError
from ray_dwm.orchestration.fit import fit, fit_until
from ray_dwm.orchestration.sweep import RaySweep
from ray_dwm.orchestration.work import timed
from ray_dwm.selection import mates
from ray_dwm.selection.choose import drawn, highest
from ray_dwm.selection.method import RowFunction, Task
from ray_dwm.selection.random import RandomScores
from ray_dwm.selection.record import RECORD, describe
from ray_dwm.selection.scores import Keyed, gather
from ray_dwm.selection.targets import read_targets


def check_stages(config: RunConfig, pool: Manifest) -> None:
    """Check whether the stages of a run can be gone through; starts nothing.

    Raises:
        ConfigError, DataError: naming the key or file and the remedy.
    """
    options, stages = config.selection, config.selection.mates.stages
    read_targets(config, pool)
    for key in ("output", "scores", "keep_scores"):
        if getattr(options, key):
            raise ConfigError(f"selection.{key} is of `ray-dwm select`, a run by mates scores anew: leave it empty")
    if not 2 <= stages <= config.train.steps:
        raise ConfigError(
            f"selection.mates.stages is {stages}: it must be at least 2, the first of which is random, and at most "
            f"train.steps = {config.train.steps}"
        )
    least = pool.rows // stages if options.mates.candidates == "part" else pool.rows
    mates.check_probes(options, least)
    _check_counts(config, pool, least)


def _check_counts(config: RunConfig, pool: Manifest, least: int) -> None:
    """Compare what stages take with the candidates of the smallest one."""
    options, batch = config.selection, config.train.global_batch
    most = max(_count(config, pool, stage) for stage in cut(config.train.steps, options.mates.stages))
    if most < batch:
        raise ConfigError(
            f"selection.budget is {options.budget} tokens, {most} sequences a stage: it must be at least "
            f"train.global_batch = {batch} sequences, or 0 for what a stage trains on"
        )
    if most > least:
        whole = "set selection.mates.candidates=pool, " if least < most <= pool.rows else ""
        raise ConfigError(
            f"a stage by mates takes {most} sequences, and has {least} of the pool {pool.folder} to choose from: "
            f"{whole}use a larger pool, fewer train.steps, or a selection.budget of at most {least * pool.seq_len} "
            "tokens, which a stage then reads more than once"
        )


def fit_stages(config: RunConfig, pool: Manifest) -> dict[str, Any]:
    """Train a run whose folder is claimed to its end, stage by stage; returns summary.json's content.

    Raises:
        TrainingError: as of `fit`.
        UserError: data or checkpoints are not what they must be.
    """
    *stages, last = cut(config.train.steps, config.selection.mates.stages)
    for stage in stages:
        if (newest_step(config.run_dir) or 0) < stage.stop:
            _choose(config, pool, stage)
            fit_until(config, pool, stage.stop, _figures(config))
    _choose(config, pool, last)
    return fit(config, pool, _figures(config))


def _choose(config: RunConfig, pool: Manifest, stage: Stage) -> None:
    """Choose what a stage trains on, unless that is done."""
    folder = stage_folder(config.run_dir, stage.number)
    work = folder.parent / f".{stage.number}.work"
    if folder.exists():
        shutil.rmtree(work, ignore_errors=True)  # a kill may have left it
        return
    if stop_path(config).exists():
        raise Stopped(f"[{config.name}] stopped at step {stage.first}, before the next: the same command continues")
    at = newest_step(config.run_dir) or 0
    if at != stage.first:
        raise DataError(
            f"{folder}, which says what stage {stage.number} trains on, is missing, and the newest checkpoint is of "
            f"step {at}, not of the stage's first, {stage.first}: restore it, or remove later checkpoints or the run"
        )
    task = Task(
        options=config.selection,
        seed=int(np.random.SeedSequence((config.seed, stage.number)).generate_state(1, np.uint32)[0]),
        pool=pool,
        targets=read_targets(config, pool),
        sweep=RaySweep(work, config.selection, f"[{config.name}] stage {stage.number}: "),
    )
    try:
        with timed(work) as seconds:
            rows, record = _chosen(config, task, stage)
            record["seconds"] = seconds()
        _write(work / "ready", rows, record)
        os.rename(work / "ready", folder)
    except OSError as error:
        raise TrainingError(
            f"{folder} cannot be written ({error.strerror or error}): free space there and start the same command again"
        ) from None
    shutil.rmtree(work, ignore_errors=True)
    say(config.run_dir, _told(record))


def _write(folder: Path, rows: NDArray[np.int64], record: dict[str, Any]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    np.save(folder / ROWS, rows)
    write_whole(folder / RECORD, json.dumps(record, indent=2) + "\n")


def _chosen(config: RunConfig, task: Task, stage: Stage) -> tuple[NDArray[np.int64], dict[str, Any]]:
    """The rows of a stage, ascending, and its record."""
    pool, folder = task.pool, str(task.pool.folder)
    candidates = _candidates(config, pool, stage)
    if stage.number == 0:
        scorer: RowFunction = RandomScores(task.seed)
        choose = highest
    else:
        looks, weights = [(str(config.run_dir), stage.first)], config.bilevel.target_weights
        scorer = mates.learn(task, looks, candidates, seq_len(config, pool), weights)
        choose = drawn
    blocks = task.sweep("scores", folder, Keyed(scorer), candidates)
    scored = gather(blocks, pool, len(candidates))
    places = choose(task, scored, _count(config, pool, stage))
    rows = candidates[places]
    before = [chosen_rows(config.run_dir, number) for number in range(stage.number)]
    return rows, {
        "method": "mates" if stage.number else "random",
        "stage": stage.number,
        "steps": [stage.first, stage.stop],
        "options": to_dict(config.selection),
        "notes": task.notes,
        "chosen_before": int(np.isin(rows, np.concatenate(before)).sum()) if before else 0,
        **describe(pool, scored, places),
    }


def _candidates(config: RunConfig, pool: Manifest, stage: Stage) -> NDArray[np.int64]:
    """Rows that a stage chooses from, ascending."""
    options = config.selection.mates
    if options.candidates == "pool":
        return np.arange(pool.rows)
    order = np.random.Generator(np.random.Philox(config.seed)).permutation(pool.rows)
    return np.sort(np.array_split(order, options.stages)[stage.number])


def _count(config: RunConfig, pool: Manifest, stage: Stage) -> int:
    """Rows to be chosen for a stage."""
    if config.selection.budget:
        return config.selection.budget // pool.seq_len
    return (stage.stop - stage.first) * config.train.global_batch


def _figures(config: RunConfig) -> dict[int, dict[str, float]]:
    """What the line of each stage's first step says of its influence model."""
    figures = {}
    for path in stage_folder(config.run_dir, 0).parent.glob(f"*/{RECORD}"):
        record = read_json(path)
        if record["notes"]:
            figures[record["steps"][0] + 1] = {f"mates/{key}": record["notes"][key] for key in ("spearman", "r2")}
    return figures


def _told(record: dict[str, Any]) -> str:
    """A stage's selection in a line."""
    first, stop = record["steps"]
    sequences, notes = record["sequences"], record["notes"]
    text = (
        f"stage {record['stage']}, steps {first + 1} to {stop}: {sequences['selected']} of {sequences['pool']} "
        f"sequences by {record['method']}"
    )
    if notes:
        text += f"; the influence model's Spearman correlation is {notes['spearman']:.2f} on {notes['judged']:g} probes"
    return text
