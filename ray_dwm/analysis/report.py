"""report.html: self-contained, opens offline, in light and dark, on a screen and on a phone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ray_dwm.analysis import cautions, figures
from ray_dwm.analysis.data_card import data_cards
from ray_dwm.analysis.overlaps import unchecked
from ray_dwm.analysis.preference_section import section
from ray_dwm.analysis.render import render
from ray_dwm.analysis.results import task_table
from ray_dwm.analysis.runs import Run, open_runs, versions
from ray_dwm.analysis.settings import settings_table
from ray_dwm.analysis.tables import Table
from ray_dwm.analysis.task_curves import task_curves
from ray_dwm.analysis.verdict import differences, sentence, verdict
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
    runs = open_runs(folders)
    content = _content(runs)
    found = preferences or {}
    content["preferences"] = [
        section(run, found.get(run.folder, "it was not asked for")) for run in runs if run.weighted
    ]
    write_whole(output.absolute(), render("report.html", content))


def _content(runs: list[Run]) -> dict[str, Any]:
    uniform = next((run for run in runs if not run.weighted), None)
    weighted = [run for run in runs if run.weighted]
    shown = weighted[0] if weighted else runs[0]
    return {
        "runs": runs,
        "verdicts": [_verdict(uniform, run) for run in weighted] if uniform else [],
        "cautions": cautions.grouped(cautions.of_runs(runs, uniform)),
        "unchecked": unchecked(runs),
        "standings": standings(runs) if len(runs) > 2 else None,
        "losses": [
            (
                _title(key, shown),
                figures.losses(runs, key, "tokens"),
                figures.losses(runs, key, "time_s"),
            )
            for key in dict.fromkeys(key for run in (shown, *runs) for key in run.keys("val/"))
        ],
        "tasks": task_table({run.name: [run] for run in runs}),
        "task_curves": task_curves(runs),
        "weighted": [_weighted(run) for run in weighted],
        "times": figures.time_split({run.name: run.summary["seconds"] for run in runs}),
        "cards": data_cards(sorted(runs, key=lambda run: run is not shown)),
        "settings": settings_table({run.name: run.config for run in runs}),
        "configs": [(run.name, to_yaml(run.config)) for run in runs],
        "versions": versions(),
    }


def _verdict(uniform: Run, weighted: Run) -> dict[str, Any]:
    return {
        "label": weighted.label,
        "run": weighted.name,
        "sentence": sentence(uniform, weighted),
        "rows": verdict(uniform, weighted),
        "differences": differences(uniform, weighted),
    }


def standings(runs: Sequence[Run]) -> Table:
    """All runs side by side, best first by the target set, or else by the first set there is."""
    keys = list(dict.fromkeys(key for run in runs for key in run.summary["final"]))
    keys.sort(key=lambda key: key != "val/target/loss")
    ordered = sorted(runs, key=lambda run: run.summary["final"].get(keys[0], float("inf")) if keys else 0.0)
    rows = []
    for run in ordered:
        final, cost = run.summary["final"], (run.summary["train_seconds"], run.summary["overhead_frac"])
        losses = (f"{final[key]:.4f}" if key in final else "" for key in keys)
        rows.append((run.name, run.label, *losses, f"{run.summary['tokens']:,}", f"{cost[0]:.0f}", f"{cost[1]:.1%}"))
    names = (f"loss, {key.removeprefix('val/').removesuffix('/loss')}" for key in keys)
    return Table("All runs", ("run", "weights", *names, "tokens", "training, s", "overhead"), tuple(rows), 2)


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
        "run": run.name,
        "label": run.label,
        "learnt": learnt,
        "domains": figures.domain_weights(run),
        "ess": figures.effective_size(run),
        "hypergradient": figures.hypergradient(run) if learnt else None,
        "overhead_frac": run.summary["overhead_frac"],
        "fidelity": figures.fidelity(run) if checked else None,
        "predicted": figures.predicted_change(run) if checked else None,
        "visits": _visits(config.bilevel),
        "estimator": config.bilevel.estimator,
    }
