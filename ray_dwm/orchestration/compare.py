"""Uniform weights against those that a configuration asks for: two runs, a report and a verdict."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from ray_dwm.analysis.overlaps import look
from ray_dwm.analysis.report import write_report
from ray_dwm.analysis.runs import Run, open_run
from ray_dwm.analysis.verdict import format_table, verdict
from ray_dwm.config import RunConfig
from ray_dwm.errors import ConfigError, TrainingError, UserError
from ray_dwm.logs import say
from ray_dwm.orchestration.analyze import Analysis, preferences_of
from ray_dwm.orchestration.train import train


def compare(config: RunConfig) -> str:
    """Train with uniform weights, then as configured; the same data order, seed and tokens.

    Returns:
        The verdict table and where the report lies.

    Raises:
        ConfigError: where uniform weights are configured.
    """
    if config.weighting.method == "uniform":
        raise ConfigError("weighting.method is uniform, which is compared with itself: name another method")
    started = time.monotonic()
    uniform = dataclasses.replace(config, weighting=dataclasses.replace(config.weighting, method="uniform"))
    runs = []
    for each in (uniform, config):
        run_config = dataclasses.replace(each, name=f"{config.name}-{each.weighting.method}")
        train(run_config)
        runs.append(open_run(run_config.run_dir))
    look(runs)
    report = runs[1].folder / "report.html"
    write_report([run.folder for run in runs], report, {runs[1].folder: _preferences(runs[1], report)})
    minutes = (time.monotonic() - started) / 60
    return f"\n{format_table(verdict(*runs), runs[1].label)}\n\nreport: {report}  ({minutes:.1f} minutes)"


def _preferences(run: Run, report: Path) -> dict[str, Any] | str:
    """What the weighting preferred, without a reference LM, which would cost more than all else; or why not."""
    try:
        return preferences_of(run, Analysis(output=report))
    except (UserError, TrainingError) as error:  # as of a short run; the report is there all the same
        say(f"what it preferred is left out: {error}", run=run.name)
        return str(error)
