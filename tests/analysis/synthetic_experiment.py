"""An experiment's folder written by hand: uniform, a DWM and a baseline, with the cells that are wanted."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import yaml
from synthetic_runs import STEPS, fill

from ray_dwm.analysis.grid import EXPERIMENT, Grid, read_grid, record_path
from ray_dwm.config import to_dict
from ray_dwm.config.experiment import Cell, ExperimentConfig, load_experiment, run_config

TEXT = """
name: x
config: {base}
baseline: uniform
measure: test
repeat: dwm
methods:
  uniform: {{set: {{weighting.method: uniform}}}}
  dwm: {{label: DWM | learnt, against: [loss, null-shuffled]}}
  loss: {{set: {{weighting.method: loss}}}}
"""
UNIFORM = {0: 3.0, 1: 3.1, 2: 3.2}


def begun(shards: dict[str, Path], root: Path) -> ExperimentConfig:
    """An experiment of which nothing has been run."""
    base = root / "base.yaml"
    data = {"train": shards["train"], "target": shards["target"], "held_out": {"test": shards["held_out"]}}
    settings = {"steps": STEPS, "global_batch": 8, "warmup_steps": 2, "eval_every": 1}
    content = {"data": data, "lm": {"preset": "tiny"}, "train": settings, "bilevel": {"warmup_steps": 2}}
    base.write_text(yaml.safe_dump(json.loads(json.dumps(content, default=str))))
    file = root / "x.yaml"
    file.write_text(TEXT.format(base=base))
    found = load_experiment(file, [f"storage={root / 'runs'}"])
    found.folder.mkdir(parents=True)
    (found.folder / EXPERIMENT).write_text(yaml.safe_dump(to_dict(found), sort_keys=False))
    return found


def finish(experiment: ExperimentConfig, method: str, finals: dict[int, float], **record: object) -> None:
    """Cells whose held-out loss falls in a straight line from 4.1 to `final` + 0.1."""
    for seed, final in finals.items():
        write_cell(experiment, Cell("tiny", method, seed), final, **record)


def write_cell(experiment: ExperimentConfig, cell: Cell, final: float, **record: object) -> Path:
    place = experiment.folder / cell.path
    path = record_path(experiment.folder, cell)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"state": "done", "devices": ["d"], "at_once": 1, **record}))
    config = dataclasses.replace(run_config(experiment, cell, {}), name=place.name, storage=str(place.parent))
    return fill(config, final)


def read(experiment: ExperimentConfig) -> Grid:
    return read_grid(experiment.folder)
