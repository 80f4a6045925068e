"""A trial's driver: starts one Ray Train run like any other, and tells Tune what its curve says while it goes on.

Figures are read from the run's metrics.jsonl, as the console's progress line is: workers need not know that they are a
trial's, and a trial that is tried again goes on in its run folder.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
import typing
from pathlib import Path
from types import TracebackType
from typing import Any

from ray import tune

from ray_dwm.config import RunConfig, build
from ray_dwm.config.tune import UNIFORM, with_values
from ray_dwm.data.records import LOCK, outlive, read_metrics, write_whole
from ray_dwm.engine.clock import PHASES, overhead
from ray_dwm.errors import DwmError
from ray_dwm.orchestration.progress import last_line
from ray_dwm.orchestration.train import train

_POLL_S = 1.0
_FORMER_S = 60.0
"""For so long, the driver of an earlier try may live on: it ends soon after whoever started it was killed."""
_OWN = ("folder", "control")
COMPLETE = "complete"
"""In the figures of a trial that was trained to its end."""
STATE_TRACKING = "RAY_TRAIN_ENABLE_STATE_TRACKING"
"""Has Ray Train keep what its runs, attempts and workers are at, for Ray's dashboard."""


def values_of(given: dict[str, Any]) -> dict[str, Any]:
    """Dotted key -> value of what Tune hands to a trial; of the uniform control, what makes it uniform."""
    if given["control"] == "uniform":
        return dict(UNIFORM)
    return {key: value for key, value in given.items() if key not in _OWN}


def trial_config(base: RunConfig, given: dict[str, Any], trials: Path) -> RunConfig:
    """The run of a trial, in its folder.

    Raises:
        ConfigError: its values exclude each other.
    """
    return dataclasses.replace(with_values(base, values_of(given)), storage=str(trials), name=given["folder"])


def run_trial(given: dict[str, Any], *, base: dict[str, Any], trials: Path, measure: str, tracked: bool) -> None:
    """What Tune calls, in a process of its own.

    Args:
        given: dotted key -> value, and the trial's folder and control.
        base: the run without a trial's values, as plain values with absolute paths.
        measure: the evaluation set whose loss counts.
        tracked: keep Ray Train's state for a dashboard.

    Raises:
        DwmError: it failed; the reason is also left beside its folder.
    """
    if tracked:
        os.environ.setdefault(STATE_TRACKING, "1")
    record = trials / f"{given['folder']}.json"
    try:
        config = trial_config(typing.cast(RunConfig, build(RunConfig, base)), given, trials)
        outlive(config.run_dir / LOCK, _FORMER_S)
        with Curve(config, measure):
            summary = train(config)
    except Exception as error:
        reason = str(error) if isinstance(error, DwmError) else f"{type(error).__name__}: {error}"
        trials.mkdir(parents=True, exist_ok=True)
        write_whole(record, json.dumps({"reason": " ".join(reason.split())}) + "\n")
        raise
    record.unlink(missing_ok=True)
    loss, cost = summary["final"][f"val/{measure}/loss"], summary["overhead_frac"]
    tune.report({"tokens": summary["tokens"], "loss": loss, "overhead": cost, COMPLETE: 1})


class Curve:
    """A context in which Tune hears of every evaluation but the last, whose figures the end has more exactly."""

    def __init__(self, config: RunConfig, measure: str) -> None:
        self._path, self._key = config.run_dir / "metrics.jsonl", f"val/{measure}/loss"
        self._every, self._last, self._told = config.train.eval_every, config.train.steps, 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Curve:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(_POLL_S):
            line = last_line(self._path)  # the whole file, which grows with every step, is read once an evaluation
            if line is not None and line["step"] // self._every > self._told // self._every:
                self._look()

    def _look(self) -> None:
        for point in curve(self._path, self._key):
            if self._told < point["step"] < self._last:
                self._told = point["step"]
                tune.report({key: point[key] for key in ("tokens", "loss", "overhead")})


def curve(path: Path, key: str) -> list[dict[str, Any]]:
    """What metrics.jsonl says at each evaluation after the first step: step, tokens, loss, and the overhead so far."""
    if not path.is_file():
        return []
    totals, found = dict.fromkeys(PHASES, 0.0), []
    for line in read_metrics(path):
        totals = {phase: total + line.get(f"seconds/{phase}", 0.0) for phase, total in totals.items()}
        if key in line and line["step"] > 0:
            point = {"step": int(line["step"]), "tokens": int(line["tokens"]), "loss": line[key]}
            found.append({**point, "overhead": overhead(totals)})
    return found
