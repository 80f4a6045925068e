"""The entrypoint of the cpu-kind overlay as a job on nodes with the pods' resources, of which one is lost on the way.

KubeRay submits it so, but for the token, which no cluster of the tests asks for: `ray job submit`, no working folder,
the raylets' own folder being the source tree.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from gloo import run
from manifests import ROOT, Manifest, containers, documents
from orchestration.conftest import PATIENCE_S, RAY, Console, wait_for
from ray.cluster_utils import Cluster

from ray_dwm.config import RunConfig, load
from ray_dwm.data.records import read_metrics
from ray_dwm.engine.loop import Trainer
from ray_dwm.engine.setup import build
from ray_dwm.orchestration import leaving

STEPS = 40
SMALLER = ("lm.preset=tiny", f"train.steps={STEPS}", "train.global_batch=9", "train.micro_batch=8")
SMALLER += ("bilevel.warmup_steps=1", "checkpoint.every=10", "tracking.wandb=off")
ELASTIC = ("cluster.workers=1,2", "cluster.cpus_per_worker=2")  # all that a pod has, so that each has one to itself
# What amplifies rounding is kept small: Adam where gradients are, and the DWM's.
ELASTIC += ("bilevel.estimator=central", "bilevel.epsilon=0.1", "train.eps=1e-4", "dwm.lr=3e-4")


@pytest.fixture
def job() -> Manifest:
    """The RayJob of the overlay."""
    [job] = [each for each in documents("cpu-kind") if each["kind"] == "RayJob"]
    return job


@pytest.fixture
def pods(job: Manifest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A node for each pod of the RayJob, with its variables and what Ray counts of it."""
    spec = job["spec"]["rayClusterSpec"]
    for _, container in containers(job):
        for variable in container.get("env", []):
            if "value" in variable:
                monkeypatch.setenv(variable["name"], variable["value"])
    # Ray Train plans with a lost node for up to 20 s, and each time waits so long for a place on it.
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "5")
    monkeypatch.setenv("PATH", f"{RAY.parent}:{os.environ['PATH']}")
    monkeypatch.chdir(ROOT)
    head = {kind: float(amount) for kind, amount in spec["headGroupSpec"]["resources"].items()}
    options = {"num_cpus": head.pop("CPU"), "resources": head, "include_dashboard": True, "dashboard_port": 0}
    options["include_log_monitor"] = False
    cluster = Cluster(initialize_head=True, head_node_args=options)
    for group in spec["workerGroupSpecs"]:
        [container] = group["template"]["spec"]["containers"]
        for _ in range(group["replicas"]):
            cluster.add_node(num_cpus=int(container["resources"]["limits"]["cpu"]))
    yield cluster
    cluster.shutdown()


def undisturbed(config: RunConfig) -> list[float]:
    """Losses of the run in one process, without Ray."""
    config.run_dir.mkdir(parents=True)
    Trainer(build(config)).fit()
    return losses(config.run_dir)


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


def test_the_entrypoint_trains_on_the_pods_and_on_those_that_are_left(
    job: Manifest, pods: Cluster, shards: dict[str, Path], tmp_path: Path
) -> None:
    data = tmp_path / "shared/data/quickstart"
    data.mkdir(parents=True)
    for name, folder in (("train", "train"), ("target", "target"), ("novels", "held_out"), ("mixture", "held_out")):
        (data / name).symlink_to(shards[folder])
    words = [*job["spec"]["entrypoint"].replace("/shared/", f"{tmp_path}/shared/").split(), *SMALLER, *ELASTIC]
    command = [str(RAY), "job", "submit", f"--address=http://{pods.webui_url}", "--", *words]
    with (tmp_path / "log").open("w") as log:
        submitter = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    run_dir = tmp_path / "shared/runs/quickstart"
    path = run_dir / "metrics.jsonl"
    try:
        wait_for(lambda: path.exists() or submitter.poll() is not None, "the first step")
        assert path.exists(), (tmp_path / "log").read_text()
        # What a pod's preStop hook looks for, among processes of this run.
        drivers = [Path(f"/proc/{pid}/cmdline").read_text() for pid in leaving.drivers(leaving.PROCESSES)]
        wait_for(lambda: len(path.read_text().splitlines()) > 15 or submitter.poll() is not None, "step 15")
        workers = Console({"RAY_ADDRESS": pods.address}, tmp_path).processes("ray::RayTrainWorker")
        nodes = [worker.ppid() for worker in workers]
        pods.remove_node(pods.list_all_nodes()[-1], allow_graceful=False)
        assert len(path.read_text().splitlines()) < STEPS, "the run was over before its node was lost"
        assert submitter.wait(PATIENCE_S) == 0, (tmp_path / "log").read_text()
    finally:
        submitter.kill()
    assert len([command for command in drivers if str(tmp_path) in command]) == 1
    assert len(nodes) == len(set(nodes)) == 2, "each had a pod to itself"
    assert "starting 1 to 2 workers" in (tmp_path / "log").read_text()
    assert json.loads((run_dir / "summary.json").read_text())["workers"] == 1
    weights = pq.read_table(run_dir / "weights")
    assert weights["step"].to_pylist() == [step for step in range(1, STEPS + 1) for _ in range(9)]
    config = load([ROOT / "configs/quickstart.yaml"], [word for word in words if "=" in word])
    alone = replace(config, storage=str(tmp_path / "alone"))
    assert losses(run_dir) == pytest.approx(run(1, tmp_path / "p", undisturbed, alone), abs=1e-5)
