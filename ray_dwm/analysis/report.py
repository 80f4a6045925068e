"""report.html: self-contained, opens offline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape

from ray_dwm.analysis import figures
from ray_dwm.analysis.preference_section import section
from ray_dwm.analysis.runs import Run, open_run, versions
from ray_dwm.analysis.tasks_section import tasks_section
from ray_dwm.analysis.verdict import differences, verdict
from ray_dwm.config import BilevelConfig, to_yaml
from ray_dwm.data.records import write_whole


def write_report(
    folders: list[Path], output: Path, preferences: Mapping[Path, dict[str, Any] | str] | None = None
) -> None:
    """Write the report of one or more runs; the first with uniform weights is the baseline.

    Args:
        preferences: run folder -> the numbers of its preferences.json, or why there are none.

    Raises:
        UserError: no run folders, or damaged ones.
    """
    runs = [open_run(folder) for folder in folders]
    environment = Environment(loader=PackageLoader("ray_dwm.analysis", "."), autoescape=select_autoescape())
    content = _content(runs)
    found = preferences or {}
    content["preferences"] = [
        section(run, found.get(run.folder, "it was not asked for")) for run in runs if run.weighted
    ]
    write_whole(output.absolute(), environment.get_template("report.html").render(**content))


def _content(runs: list[Run]) -> dict[str, Any]:
    uniform = next((run for run in runs if not run.weighted), None)
    weighted = next((run for run in runs if run.weighted), None)
    shown = weighted or runs[0]
    return {
        "runs": runs,
        "rows": verdict(uniform, weighted) if uniform and weighted else [],
        "differences": differences(uniform, weighted) if uniform and weighted else [],
        "losses": [
            (
                _title(key, shown),
                figures.losses(runs, key, "tokens"),
                figures.losses(runs, key, "time_s"),
            )
            for key in shown.keys("val/")
        ],
        "tasks": tasks_section(runs),
        "weighted": _weighted(weighted) if weighted else None,
        "configs": [(run.name, to_yaml(run.config)) for run in runs],
        "versions": versions(),
    }


def _title(key: str, run: Run) -> str:
    name = key.removeprefix("val/").removesuffix("/loss")
    if name == "target":
        return "Target set"
    return f"Target set: {name}" if name in run.config.data.more_targets else f"Held-out set: {name}"


def _visits(bilevel: BilevelConfig) -> str:
    """When the upper level was visited, in words."""
    if bilevel.stages:
        return f"{bilevel.stage_updates} times at the start of each of {bilevel.stages} stages"
    return f"every {bilevel.every} steps" if bilevel.every else f"within a budget of {bilevel.max_overhead:.0%}"


def _weighted(run: Run) -> dict[str, Any]:
    config = run.config
    learnt = config.learns_dwm
    checked = learnt and bool(run.series("dwm/fidelity")[0])
    return {
        "label": run.label,
        "learnt": learnt,
        "domains": figures.domain_weights(run),
        "ess": figures.effective_size(run),
        "hypergradient": figures.hypergradient(run) if learnt else None,
        "overhead": figures.overhead(run),
        "overhead_frac": run.summary["overhead_frac"],
        "fidelity": figures.fidelity(run) if checked else None,
        "predicted": figures.predicted_change(run) if checked else None,
        "visits": _visits(config.bilevel),
        "estimator": config.bilevel.estimator,
    }
