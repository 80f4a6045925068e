"""A run to its end, and what it leaves."""

from __future__ import annotations

from typing import Any

from ray_dwm.config import RunConfig
from ray_dwm.data.records import read_metrics
from ray_dwm.engine.checks import check_data
from ray_dwm.engine.export import export_dwm
from ray_dwm.engine.loop import Trainer
from ray_dwm.engine.mesh import shard
from ray_dwm.engine.setup import build


def fitted(config: RunConfig) -> dict[str, Any]:
    """Metrics, final LM, and the optimizer's step count."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    manifest = check_data(config)
    parts = build(config, on_version=lambda step: export_dwm(parts, manifest, step))
    Trainer(parts).fit()
    state = parts.lower.optimizer.state[parts.lower.parameters[0]]
    theta = [shard(p).detach().clone() for p in parts.lower.parameters]
    return {"lines": read_metrics(config.run_dir / "metrics.jsonl"), "theta": theta, "taken": int(state["step"])}
