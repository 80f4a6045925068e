"""A run's own evaluations by tasks: one Ray task at a time beside the workers, which never wait for it.

The driver sees a checkpoint appear and has it exported and scored elsewhere. An evaluation that takes longer than the
next checkpoint lets that one pass; one that fails is said and forgotten.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
import torch

from ray_dwm import logs
from ray_dwm.config import RunConfig, build, to_dict
from ray_dwm.data.manifest import load_manifest
from ray_dwm.engine.messages import note, say
from ray_dwm.engine.saved import list_checkpoints, step_of
from ray_dwm.errors import first_line
from ray_dwm.evaluation import scores
from ray_dwm.evaluation.contamination import Overlap, refuse
from ray_dwm.evaluation.harness import Tasks
from ray_dwm.evaluation.judge import compared

_POLL_S = 0.5
_NICENESS = 10
_PREFIX = ".evaluation."


def check_tasks(config: RunConfig) -> list[Overlap]:
    """Load the tasks that a run is to be evaluated by, and compare them with its data, before anything starts.

    Raises:
        UserError: lm-eval is not installed, a task is not good, or it overlaps with the data too much.
    """
    asked = config.evaluation
    if not asked.tasks:
        return []
    with tempfile.TemporaryDirectory(prefix="ray_dwm.") as folder:
        tasks = Tasks(asked.tasks, Path(folder))
        tasks.check_shots(asked.shots)
        found = compared(tasks, config, config.run_dir)
    for overlap in found:
        logs.say(str(overlap), run=config.name)
    refuse(found, asked.max_overlap, "evaluation.max_overlap")
    return found


class Evaluations:
    """A context in which the driver has a run's checkpoints evaluated, as section `evaluation` says."""

    def __init__(self, config: RunConfig, found: list[Overlap]) -> None:
        self._config, self._run_dir = config, config.run_dir
        self._seen: set[int | None] = set()
        if config.evaluation.tasks:
            scores.keep(self._run_dir, None, found)
            self._seen.update(of.step for of in scores.read_evaluations(self._run_dir))
        self._running: tuple[int, Any] | None = None
        self._failed: list[str] = []
        self._training = True
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Evaluations:
        for left in self._run_dir.glob(f"{_PREFIX}*"):  # of a killed one
            shutil.rmtree(left, ignore_errors=True)
        if self._config.evaluation.every:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_watch()
        if self._running is not None:  # the run has failed, or was stopped
            ray.cancel(self._running[1], force=True)

    def finish(self) -> None:
        """Training is over: wait for what still runs, score the finished LM, say what failed."""
        self._end_watch()
        self._training = False
        if self._config.evaluation.tasks:
            self._collect(None)
            try:
                self._start(self._config.train.steps, None)
            except Exception as error:  # the run is whole without it
                self._failed.append(f"the finished LM cannot be evaluated: {first_line(error)}")
            self._collect(None)
        for told in self._failed:
            say(self._run_dir, told)

    def _end_watch(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    def _watch(self) -> None:
        told = ""
        while not self._stop.wait(_POLL_S):
            try:
                self._look()
            except Exception as error:  # as of a file system that fails for a while: the next look may be better
                before, told = told, f"checkpoints cannot be looked at for their evaluation: {first_line(error)}"
                if told != before:
                    self._tell(told)

    def _look(self) -> None:
        """One look at the run folder: take what has ended, start what is due."""
        self._collect(0)
        every, last = self._config.evaluation.every, self._config.train.steps
        found = {step_of(path): path for path in list_checkpoints(self._run_dir / "checkpoints")}
        due = [step for step in found if step % every == 0 and step < last and step not in self._seen]
        self._seen.update(due)
        for step in reversed(due):  # the newest first
            if self._running is None:
                self._start(step, found[step])
            else:
                self._tell(f"step {step} is not evaluated: the evaluation of step {self._running[0]} still runs")

    def _start(self, step: int, checkpoint: Path | None) -> None:
        asked = self._config.evaluation
        environment = {
            "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
            "DISABLE_MULTIPROC": "1",  # lm-eval's bootstrap would take all cores; the figures are the same
            **({} if asked.gpus else {"CUDA_VISIBLE_DEVICES": ""}),
        }
        once = ray.remote(max_calls=1)(_evaluate)  # its process is of low priority, and goes with it
        remote = once.options(
            name=f"evaluate-{self._config.name}-{step}",
            num_cpus=asked.cpus,
            num_gpus=asked.gpus,
            max_retries=0,
            scheduling_strategy="DEFAULT",  # a sweep's trial lies in a placement group that holds its driver alone
            runtime_env={"env_vars": environment},
        )
        self._running = (step, remote.remote(to_dict(self._config), checkpoint and str(checkpoint), step))

    def _collect(self, timeout: float | None) -> None:
        """Take the running evaluation's scores, if it ends in time; None waits for it."""
        if self._running is None:
            return
        step, reference = self._running
        if not ray.wait([reference], timeout=timeout)[0]:
            return
        self._running = None
        try:
            evaluation = scores.from_dict(ray.get(reference))
            scores.keep(self._run_dir, evaluation)
        except Exception as error:  # whatever has befallen it, training goes on
            self._failed.append(f"the evaluation of step {step} failed: {_reason(error)}")
            self._tell(self._failed[-1])
            return
        told = (f"{of.task} {of.metric} ({of.shots} shots) {scores.with_error(of)}" for of in evaluation.scores)
        self._tell(f"step {step}: {', '.join(told)}")

    def _tell(self, text: str) -> None:
        """While it trains, the progress line passes on what messages.log says."""
        (note if self._training else say)(self._run_dir, text)


def _reason(error: Exception) -> str:
    cause = error.cause if isinstance(error, ray.exceptions.RayTaskError) else error
    return first_line(cause)


def _evaluate(values: dict[str, Any], checkpoint: str | None, step: int) -> dict[str, Any]:
    """In a process of its own: scores of a checkpoint, or without one of the finished LM in hf/, as plain values."""
    from ray_dwm.engine.export import export_checkpoint  # transformers, which the driver does not need

    os.nice(_NICENESS)
    config: RunConfig = build(RunConfig, values)
    asked, train = config.evaluation, load_manifest(config.data.train)
    torch.set_num_threads(max(1, int(asked.cpus)))
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=config.run_dir) as folder:
        lm = config.run_dir / "hf"
        if checkpoint is not None:
            lm = Path(folder) / "lm"
            export_checkpoint(config, train, Path(checkpoint), lm)
        tasks = Tasks(asked.tasks, Path(folder) / "tasks")
        tokens = step * config.train.global_batch * (config.lm.seq_len or train.seq_len)
        return scores.to_dict(tasks.evaluate(lm, asked.shots, asked.batch, step=step, tokens=tokens))
