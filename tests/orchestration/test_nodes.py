"""Runs on several nodes that have the resources and variables of the cpu-kind overlay's pods.

Its entrypoint, as KubeRay submits it but for the token, which no cluster of the tests asks for: `ray job submit`, no
working folder, the raylets' own folder being the source tree. And an elastic worker group of which a node is lost.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from gloo import run
from manifests import ROOT, Manifest, containers, documents
from orchestration.conftest import PATIENCE_S, RAY, Console, wait_for
from ray.cluster_utils import Cluster
from synthetic import tiny_config

from ray_dwm.config import RunConfig
from ray_dwm.data.records import read_metrics
from ray_dwm.engine.loop import Trainer
from ray_dwm.engine.setup import build
from ray_dwm.orchestration import leaving

POD_CPUS = 2
"""Of a worker's pod; a worker that asks for all of them has one to itself."""

SMALLER = "lm.preset=tiny train.steps=8 train.global_batch=16 train.micro_batch=4 train.eval_every=4 bilevel.every=2 "
SMALLER += "bilevel.warmup_steps=1 checkpoint.every=4 tracking.wandb=off"

STEPS = 40
ELASTIC = ("cluster.workers=1,3", f"cluster.cpus_per_worker={POD_CPUS}", f"train.steps={STEPS}", "train.global_batch=9")
ELASTIC += ("checkpoint.every=10", "bilevel.every=5")
# What amplifies rounding is kept small: Adam where gradients are, and the DWM's.
ELASTIC += ("bilevel.estimator=central", "bilevel.epsilon=0.1", "train.eps=1e-4", "dwm.lr=3e-4")


@pytest.fixture(scope="module")
def job() -> Manifest:
    """The RayJob of the overlay."""
    [job] = [each for each in documents("cpu-kind") if each["kind"] == "RayJob"]
    return job


@pytest.fixture(scope="module")
def pods(job: Manifest) -> Iterator[Cluster]:
    """A node for each pod of the RayJob, with its variables and what Ray counts of it."""
    spec = job["spec"]["rayClusterSpec"]
    head = {kind: float(amount) for kind, amount in spec["headGroupSpec"]["resources"].items()}
    options = {"num_cpus": head.pop("CPU"), "resources": head, "include_dashboard": True, "dashboard_port": 0}
    with pytest.MonkeyPatch.context() as patch:
        for _, container in containers(job):
            for variable in container.get("env", []):
                if "value" in variable:
                    patch.setenv(variable["name"], variable["value"])
        patch.setenv("PATH", f"{RAY.parent}:{os.environ['PATH']}")
        patch.chdir(ROOT)
        cluster = Cluster(initialize_head=True, head_node_args={**options, "include_log_monitor": False})
        for group in spec["workerGroupSpecs"]:
            [container] = group["template"]["spec"]["containers"]
            assert container["resources"]["limits"]["cpu"] == str(POD_CPUS)
            for _ in range(group["replicas"]):
                cluster.add_node(num_cpus=POD_CPUS)
        yield cluster
        cluster.shutdown()


def test_the_entrypoint_trains_on_the_pods(
    job: Manifest, pods: Cluster, shards: dict[str, Path], tmp_path: Path
) -> None:
    data = tmp_path / "shared/data/quickstart"
    data.mkdir(parents=True)
    for name, folder in (("train", "train"), ("target", "target"), ("novels", "held_out"), ("mixture", "held_out")):
        (data / name).symlink_to(shards[folder])
    entrypoint = job["spec"]["entrypoint"].replace("/shared/", f"{tmp_path}/shared/")
    command = [str(RAY), "job", "submit", f"--address=http://{pods.webui_url}", "--", *entrypoint.split()]
    with (tmp_path / "log").open("w") as log:
        submitter = subprocess.Popen([*command, *SMALLER.split()], stdout=log, stderr=subprocess.STDOUT)
    folder = tmp_path / "shared/runs/quickstart"
    try:
        wait_for(lambda: (folder / "metrics.jsonl").exists() or submitter.poll() is not None, "the first step")
        # What a pod's preStop hook looks for, among processes of this run.
        drivers = [Path(f"/proc/{pid}/cmdline").read_text() for pid in leaving.drivers(leaving.PROCESSES)]
        assert submitter.wait(PATIENCE_S) == 0, (tmp_path / "log").read_text()
    finally:
        submitter.kill()
    assert len([command for command in drivers if str(tmp_path) in command]) == 1
    assert [line["step"] for line in read_metrics(folder / "metrics.jsonl")] == list(range(9))
    assert json.loads((folder / "summary.json").read_text())["workers"] == 2


def undisturbed(config: RunConfig) -> list[float]:
    """Losses of the run in one process, without Ray."""
    config.run_dir.mkdir(parents=True)
    Trainer(build(config)).fit()
    return losses(config)


def losses(config: RunConfig) -> list[float]:
    return [line["loss"] for line in read_metrics(config.run_dir / "metrics.jsonl") if "loss" in line]


def test_a_lost_node_leaves_the_run_to_the_others(pods: Cluster, shards: dict[str, Path], tmp_path: Path) -> None:
    third = pods.add_node(num_cpus=POD_CPUS)
    config = tiny_config(shards, tmp_path, *ELASTIC, "name=shrinks")
    # Ray Train plans with a lost node for up to 20 s, and each time waits so long for a place on it.
    waiting = {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "5"}
    console = Console({**os.environ, **waiting, "RAY_ADDRESS": pods.address}, tmp_path)
    process = console.start(config)
    path = config.run_dir / "metrics.jsonl"
    wait_for(lambda: path.exists() and len(path.read_text().splitlines()) > 15, "step 15")
    assert len(console.processes("ray::RayTrainWorker")) == 3
    pods.remove_node(third, allow_graceful=False)
    assert len(path.read_text().splitlines()) < STEPS, "the run was over before its node was lost"
    assert "starting 1 to 3 workers" in console.finish(config, process)
    assert json.loads((config.run_dir / "summary.json").read_text())["workers"] == 2
    weights = pq.read_table(config.run_dir / "weights")
    assert weights["step"].to_pylist() == [step for step in range(1, STEPS + 1) for _ in range(9)]
    alone = run(1, tmp_path / "p", undisturbed, tiny_config(shards, tmp_path, *ELASTIC, "name=undisturbed"))
    assert losses(config) == pytest.approx(alone, abs=1e-5)
