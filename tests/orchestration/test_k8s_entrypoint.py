"""The entrypoint of the cpu-kind overlay as a job on a cluster of three nodes with the pods' resources.

KubeRay submits it so, but for the token, which no cluster of the tests asks for: `ray job submit`, no working folder,
the raylets' own folder being the source tree.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from manifests import ROOT, Manifest, containers, documents
from orchestration.conftest import PATIENCE_S, RAY, wait_for
from ray.cluster_utils import Cluster

from ray_dwm.data.records import read_metrics
from ray_dwm.orchestration import leaving

SMALLER = "lm.preset=tiny train.steps=8 train.global_batch=16 train.micro_batch=4 train.eval_every=4 bilevel.every=2 "
SMALLER += "bilevel.warmup_steps=1 checkpoint.every=4 tracking.wandb=off"


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
    run = tmp_path / "shared/runs/quickstart"
    try:
        wait_for(lambda: (run / "metrics.jsonl").exists() or submitter.poll() is not None, "the first step")
        # What a pod's preStop hook looks for, among processes of this run.
        drivers = [Path(f"/proc/{pid}/cmdline").read_text() for pid in leaving.drivers(leaving.PROCESSES)]
        assert submitter.wait(PATIENCE_S) == 0, (tmp_path / "log").read_text()
    finally:
        submitter.kill()
    assert len([command for command in drivers if str(tmp_path) in command]) == 1
    assert [line["step"] for line in read_metrics(run / "metrics.jsonl")] == list(range(9))
    assert json.loads((run / "summary.json").read_text())["workers"] == 2
