"""Run folders written by hand: ten steps, uniform against a method that is ahead."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from synthetic import make_shards, tiny_config

from ray_dwm.config import RunConfig, to_yaml
from ray_dwm.data.manifest import load_manifest
from ray_dwm.data.shards import Rows, open_shards
from ray_dwm.engine.metrics import WeightsWriter
from ray_dwm.engine.rundir import data_digests

STEPS, BATCH, TOKENS = 10, 8, 128


def write_run(root: Path, name: str, *overrides: str, method: str, final: float) -> Path:
    """A finished run whose target loss falls in a straight line from 4 to `final`, after ten steps."""
    shards = {part: root / "shards" / part for part in ("train", "target", "held_out")}
    if not shards["train"].exists():
        make_shards(shards["train"], good=40, noise=40, seed=1)
        for part in ("target", "held_out"):
            make_shards(shards[part], good=16, noise=0, seed=2, files=1)
    options = (f"name={name}", f"weighting.method={method}", f"train.steps={STEPS}", *overrides)
    return fill(tiny_config(shards, root / "runs", *options), final)


def fill(config: RunConfig, final: float) -> Path:
    """The run folder of a configuration, as `write_run` has it; the clock of weighted runs is 1.1 times as slow."""
    folder, method = config.run_dir, config.weighting.method
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "data.json").write_text(json.dumps(data_digests(config)))
    lines = [_line(step, method, final) for step in range(STEPS + 1)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "summary.json").write_text(json.dumps(_summary(config, lines, final)))
    if method != "uniform":
        _write_weights(folder)
    return folder


def _line(step: int, method: str, final: float) -> dict[str, float]:
    loss = 4.0 + (final - 4.0) * step / STEPS
    line = {
        "step": step,
        "tokens": step * TOKENS,
        "time_s": step * (1.0 if method == "uniform" else 1.1),
        "val/target/loss": loss,
    }
    line["val/test/loss"] = loss + 0.1
    if step:
        line |= {"loss": loss + 0.1, "lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": TOKENS}
    if step and method == "dwm":
        line |= {"dwm/version": step // 2, "dwm/hypergrad_norm": 0.1}
    if step in (4, 8) and method == "dwm":
        line |= {"dwm/fidelity": 0.99, "bilevel/predicted_change": -0.01, "bilevel/realised_change": -0.012}
    if step and method != "uniform":
        line |= {"dwm/ess": 7.5, "dwm/entropy": 0.97}
        line |= {"weight/good": 1 + step / 20, "weight/noise": 1 - step / 20}
    return line


def _summary(config: RunConfig, lines: list[dict[str, float]], final: float) -> dict[str, object]:
    return {
        "name": config.name,
        "steps": STEPS,
        "tokens": lines[-1]["tokens"],
        "workers": 2,
        "train_seconds": lines[-1]["time_s"],
        "overhead_frac": 0.0 if config.weighting.method == "uniform" else 0.1,
        "seconds": {"data": 0.5, "dwm_wait": 0.1, "weigh": 0.2, "step": 9.0, "bilevel": 0.7, "log": 0.1},
        "final": {"val/target/loss": final, "val/test/loss": final},
    }


def _write_weights(folder: Path) -> None:
    """Sample i of a step has weight (2 i + 1) / BATCH."""
    writer = WeightsWriter(folder / "weights", ["good", "noise"], 0)
    for step in range(1, STEPS + 1):
        ids = [1000 + (step * BATCH + i) % 80 for i in range(BATCH)]
        weights = [(2 * i + 1) / BATCH for i in range(BATCH)]
        writer.add(step, ids, [i % 2 for i in range(BATCH)], [2.0] * BATCH, [0.0] * BATCH, weights)
    writer.flush(STEPS)


def plant_weights(config: RunConfig, log_weight: Callable[[int, Rows], np.ndarray]) -> None:
    """Record weights in proportion to exp(log_weight(step, rows)), of random batches of every step."""
    folder = config.run_dir / "weights"
    for old in folder.glob("*.parquet"):
        old.unlink()
    reader, rng = open_shards(config.data.train), np.random.default_rng(7)
    writer = WeightsWriter(folder, load_manifest(config.data.train).domain_names, 0)
    for step in range(1, config.train.steps + 1):
        rows = reader.take(rng.choice(reader.manifest.rows, size=config.train.global_batch, replace=False))
        weights = np.exp(log_weight(step, rows))
        relative = (weights / weights.mean()).tolist()
        size = len(rows)
        writer.add(step, rows.sample_ids.tolist(), rows.domains.tolist(), [2.0] * size, [0.0] * size, relative)
    writer.flush(config.train.steps)
