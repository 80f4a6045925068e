"""An elastic worker group on three real nodes, of which one is lost: the others end the run as if nothing had been."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from gloo import run
from orchestration.conftest import Console, wait_for
from ray.cluster_utils import Cluster
from synthetic import tiny_config

from ray_dwm.config import RunConfig
from ray_dwm.data.records import read_metrics
from ray_dwm.engine.loop import Trainer
from ray_dwm.engine.setup import build

STEPS = 60
OPTIONS = ("cluster.workers=1,3", f"train.steps={STEPS}", "train.global_batch=9", "checkpoint.every=10")
# What amplifies rounding is kept small: Adam where gradients are, and the DWM's.
OPTIONS += ("bilevel.estimator=central", "bilevel.epsilon=0.1", "train.eps=1e-4", "dwm.lr=3e-4", "bilevel.every=5")


@pytest.fixture
def three_nodes() -> Iterator[Cluster]:
    """A cluster of three nodes of one logical CPU: room for a worker each, and none that is left over."""
    node = {"num_cpus": 1, "object_store_memory": 150_000_000}
    head = {**node, "include_dashboard": False, "include_log_monitor": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        cluster.add_node(**node)
    yield cluster
    cluster.shutdown()


def undisturbed(config: RunConfig) -> list[float]:
    """Losses of the run in one process, without Ray."""
    config.run_dir.mkdir(parents=True)
    Trainer(build(config)).fit()
    return losses(config)


def losses(config: RunConfig) -> list[float]:
    return [line["loss"] for line in read_metrics(config.run_dir / "metrics.jsonl") if "loss" in line]


def test_a_lost_node_leaves_the_run_to_the_others(
    shards: dict[str, Path], three_nodes: Cluster, tmp_path: Path
) -> None:
    config = tiny_config(shards, tmp_path, *OPTIONS, "name=shrinks")
    # Ray Train plans with a lost node for up to 20 s, and each time waits so long for a place on it.
    waiting = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5"}
    console = Console({**os.environ, **waiting, "RAY_ADDRESS": three_nodes.address}, tmp_path)
    process = console.start(config)
    path = config.run_dir / "metrics.jsonl"
    wait_for(lambda: path.exists() and len(path.read_text().splitlines()) > 25, "step 25")
    assert len(console.processes("ray::RayTrainWorker")) == 3
    three_nodes.remove_node(three_nodes.list_all_nodes()[-1], allow_graceful=False)
    assert len(path.read_text().splitlines()) < STEPS, "the run was over before its node was lost"
    assert "starting 1 to 3 workers" in console.finish(config, process)
    assert json.loads((config.run_dir / "summary.json").read_text())["workers"] == 2
    weights = pq.read_table(config.run_dir / "weights")
    assert weights["step"].to_pylist() == [step for step in range(1, STEPS + 1) for _ in range(9)]
    alone = run(1, tmp_path / "p", undisturbed, tiny_config(shards, tmp_path, *OPTIONS, "name=undisturbed"))
    assert losses(config) == pytest.approx(alone, abs=1e-5)
