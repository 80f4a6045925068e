"""Uniform weights against those that a configuration asks for: two runs, a report and a verdict."""

from __future__ import annotations

import dataclasses
import time

from ray_dwm.analysis.report import write_report
from ray_dwm.analysis.runs import open_run
from ray_dwm.analysis.verdict import format_table, verdict
from ray_dwm.config import RunConfig
from ray_dwm.errors import ConfigError
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
    report = runs[1].folder / "report.html"
    write_report([run.folder for run in runs], report)
    minutes = (time.monotonic() - started) / 60
    return f"\n{format_table(verdict(*runs), runs[1].label)}\n\nreport: {report}  ({minutes:.1f} minutes)"
