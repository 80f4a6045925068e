"""A sweep's progress: a live table in a terminal, a line for every trial that begins or ends elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from ray.tune import Callback
from rich.console import Console
from rich.live import Live
from rich.table import Table

from ray_dwm.analysis.tuning import Trial
from ray_dwm.logs import say
from ray_dwm.orchestration.trial import COMPLETE


class Progress(Callback):
    """What Tune tells of its trials, shown beside those that were finished before."""

    def __init__(self, title: str, keys: Sequence[str], total: int, before: Sequence[Trial]) -> None:
        self._title, self._keys, self._total = title, list(keys), total
        self._trials = {trial.id: _shown(trial) for trial in before}
        self._live: Live | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Tune keeps a copy of its callbacks on disk; a terminal cannot be kept."""
        return {**self.__dict__, "_live": None}

    def setup(self, **info: Any) -> None:
        """See Callback."""
        del info
        if sys.stdout.isatty():
            self._live = Live(self._table(), console=Console(), auto_refresh=False)
            self._live.start()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See Callback."""
        self._tell(trial, "begun")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        """See Callback."""
        self._note(trial, "begun", result)
        self._refresh()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See Callback."""
        self._tell(trial, "done" if COMPLETE in (trial.last_result or {}) else "ended early")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """See Callback."""
        self._tell(trial, "failed")

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        """See Callback."""
        if self._live is not None:
            self._live.stop()

    def _tell(self, trial: Any, state: str) -> None:
        self._note(trial, state, trial.last_result or {})
        self._refresh()
        if self._live is None:
            line = "  ".join(part for part in self._line(trial.config["folder"]) if part)
            ended = sum(shown["state"] in ("done", "ended early", "failed") for shown in self._trials.values())
            say(f"{ended} of {self._total} ended  {line}", run=self._title)

    def _note(self, trial: Any, state: str, result: Mapping[str, Any]) -> None:
        name = trial.config["folder"]
        figures = {key: result[key] for key in ("loss", "overhead") if key in result}
        self._trials[name] = {**self._trials.get(name, {}), **trial.config, **figures, "state": state}

    def _line(self, name: str) -> list[str]:
        shown = self._trials[name]
        values = [f"{key.rpartition('.')[2]} {text(shown[key])}" for key in self._keys if key in shown]
        return [
            name,
            *values,
            *(f"{label} {value}" for label, value in _figures(shown).items() if value),
            shown["state"],
        ]

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(self._table(), refresh=True)

    def _table(self) -> Table:
        table = Table(title=self._title)
        for name in ("trial", *(key.rpartition(".")[2] for key in self._keys), "loss", "overhead", "state"):
            table.add_column(name)
        for name, shown in self._trials.items():
            values = [text(shown[key]) if key in shown else "" for key in self._keys]
            table.add_row(name, *values, *_figures(shown).values(), shown["state"])
        return table


def _shown(trial: Trial) -> dict[str, Any]:
    figures = {"loss": trial.loss, "overhead": trial.overhead}
    return {**trial.values, **{k: v for k, v in figures.items() if v is not None}, "state": trial.state}


def _figures(shown: Mapping[str, Any]) -> dict[str, str]:
    return {
        "loss": f"{shown['loss']:.4f}" if "loss" in shown else "",
        "overhead": f"{shown['overhead']:.1%}" if "overhead" in shown else "",
    }


def text(value: Any) -> str:
    """A value of the space for people."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
