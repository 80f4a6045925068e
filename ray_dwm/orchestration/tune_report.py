"""A sweep's report and the configuration that it recommends."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from ray_dwm.analysis.runs import versions
from ray_dwm.analysis.tuning import Correlation, Row, Trial, agreement, done, pareto, recommended
from ray_dwm.analysis.tuning_report import html, markdown
from ray_dwm.config import to_yaml
from ray_dwm.config.space import described
from ray_dwm.config.tune import TuneConfig
from ray_dwm.data.records import write_whole
from ray_dwm.orchestration.promotion import Dwms, config_of, dwms_of
from ray_dwm.orchestration.study import importances

REPORT = "report"
RECOMMENDED = "recommended.yaml"


@dataclass(frozen=True, slots=True)
class Stage:
    """What a later scale has found."""

    scale: str
    rows: list[Row]
    """Best first."""
    dwms: Dwms
    """What the trials brought along."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a sweep has found, for people."""

    folder: Path
    lines: list[str]


def write_report(config: TuneConfig, trials: Sequence[Trial], stages: Sequence[Stage], device: str) -> Found:
    """Write report.md, .json and .html, and recommended.yaml."""
    stages = [stage for stage in stages if stage.rows]
    last = stages[-1] if stages else Stage(config.first, _as_rows(trials), dwms_of(config, trials))
    row = recommended(last.rows, config.max_overhead)
    chosen = config_of(config, last.scale, row, trials, last.dwms)
    values = next((trial.values for trial in trials if trial.id == row.trial), {})
    content: dict[str, Any] = {
        "sweep": config.name,
        "measure": config.measure,
        "objectives": list(config.objectives),
        "sampler": config.sampler,
        "seed": config.seed,
        "seeds": list(config.seeds),
        "max_overhead": config.max_overhead,
        "space": {key: described(domain) for key, domain in config.space.items()},
        "log": [key for key, domain in config.space.items() if domain.log],
        "scales": list(config.scales),
        "trials": [asdict(trial) for trial in trials],
        "pareto": [trial.id for trial in pareto(trials)],
        "importance": importances(config, list(trials)),
        "stages": [{"scale": stage.scale, "rows": [asdict(row) for row in stage.rows]} for stage in stages],
        "correlations": [asdict(each) for each in _agreements(config, trials, stages)],
        "recommended": {"scale": last.scale, "values": values, **asdict(row)},
        "device": device,
        "versions": versions(),
    }
    folder = config.folder
    write_whole(folder / f"{REPORT}.json", json.dumps(content, indent=2) + "\n")
    write_whole(folder / f"{REPORT}.md", markdown(content))
    write_whole(folder / f"{REPORT}.html", html(content))
    head = f"# Recommended by sweep {config.name} for scale {last.scale}: trial {row.trial}, {row.how}.\n"
    write_whole(folder / RECOMMENDED, head + to_yaml(chosen))
    return Found(folder, _lines(content, row))


def _as_rows(trials: Sequence[Trial]) -> list[Row]:
    """The first scale's trials, where there is no later one."""
    return [
        Row(
            trial=trial.id,
            how="uniform" if trial.control == "uniform" else "learn",
            loss=trial.loss or 0.0,
            overhead=trial.overhead or 0.0,
            seeds=1,
        )
        for trial in done(trials)
    ]


def _agreements(config: TuneConfig, trials: Sequence[Trial], stages: Sequence[Stage]) -> list[Correlation]:
    """Of every scale with the next, over the settings that both have learnt, and uniform weights."""
    scales = [(config.first, _as_rows(trials)), *((stage.scale, stage.rows) for stage in stages)]
    losses: list[tuple[str, Mapping[str, float]]] = [
        (scale, {row.trial: row.loss for row in rows if row.how in ("learn", "uniform")}) for scale, rows in scales
    ]
    return [agreement(*before, *after) for before, after in pairwise(losses)]


def _lines(content: Mapping[str, Any], row: Row) -> list[str]:
    ended = [trial for trial in content["trials"] if trial["state"] in ("done", "ended early", "failed")]
    failed = sum(trial["state"] == "failed" for trial in ended)
    early = sum(trial["state"] == "ended early" for trial in ended)
    lines = [f"{len(ended)} trials at {content['scales'][0]}: {early} were ended early, {failed} failed"]
    for each in content["correlations"]:
        told = "too few or all alike" if each["spearman"] is None else f"{each['spearman']:.2f}"
        lines.append(
            f"rank correlation of {each['scale']} and {each['following']} over {len(each['settings'])} settings: {told}"
        )
    at = content["recommended"]["scale"]
    lines.append(f"recommended at {at}: trial {row.trial}, {row.how}: loss {row.loss:.4f}, overhead {row.overhead:.1%}")
    return lines
