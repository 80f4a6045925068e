"""Uniform against DWM: two runs of one configuration, a report and a verdict."""

from __future__ import annotations

import dataclasses
import time

from ray_dwm.analysis.report import write_report
from ray_dwm.analysis.runs import open_run
from ray_dwm.analysis.verdict import format_table, verdict
from ray_dwm.config import RunConfig
from ray_dwm.orchestration.train import train


def compare(config: RunConfig) -> str:
    """Train with uniform weights, then with the DWM; the same data order, seed and tokens.

    Returns:
        The verdict table and where the report lies.
    """
    started = time.monotonic()
    runs = []
    for label, enabled in (("uniform", False), ("dwm", True)):
        run_config = dataclasses.replace(
            config, name=f"{config.name}-{label}", dwm=dataclasses.replace(config.dwm, enabled=enabled)
        )
        train(run_config)
        runs.append(open_run(run_config.run_dir))
    report = runs[1].folder / "report.html"
    write_report([run.folder for run in runs], report)
    minutes = (time.monotonic() - started) / 60
    return f"\n{format_table(verdict(*runs))}\n\nreport: {report}  ({minutes:.1f} minutes)"
