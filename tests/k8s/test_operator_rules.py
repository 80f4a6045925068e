"""No manifest breaks a rule of KubeRay's operator, and each rule sees what breaks it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from manifests import Manifest, documents, of_kind
from operator_rules import complaints


@pytest.mark.parametrize(("overlay", "manifest"), of_kind("RayJob", "RayCluster"))
def test_the_operator_has_no_complaint(overlay: str, manifest: Manifest) -> None:
    assert complaints(manifest) == [], overlay


CLUSTER, GROUP = "rayClusterSpec", "rayClusterSpec.workerGroupSpecs.0"
AFTER = {"jobStatus": "FAILED", "ttlSeconds": 9}


def rules(*policies: tuple[str, dict[str, object]]) -> dict[str, object]:
    strategy = {"deletionRules": [{"policy": policy, "condition": condition} for policy, condition in policies]}
    return {"deletionStrategy": strategy, "shutdownAfterJobFinishes": False, "ttlSecondsAfterFinished": 0}


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"shutdownAfterJobFinishes": False}, "ttlSecondsAfterFinished without shutdownAfterJobFinishes"),
    (
        {"shutdownAfterJobFinishes": False, "ttlSecondsAfterFinished": 0, "suspend": True},
        "suspended without shutdownAfterJobFinishes",
    ),
    ({"ttlSecondsAfterFinished": -1}, "ttlSecondsAfterFinished below 0"),
    ({"activeDeadlineSeconds": 0}, "activeDeadlineSeconds not positive"),
    ({"preRunningDeadlineSeconds": 0}, "preRunningDeadlineSeconds not positive"),
    ({"backoffLimit": -1}, "backoffLimit below 0"),
    ({"submissionMode": "InteractiveMode"}, "backoffLimit in InteractiveMode or with clusterSelector"),
    ({"submissionMode": "SidecarMode"}, "SidecarMode with a submitter's settings or clusterSelector"),
    (
        {"clusterSelector": {"ray.io/cluster": "c"}, "suspend": True, "backoffLimit": 0},
        "suspended with clusterSelector",
    ),
    ({"deletionStrategy": {}}, "not either deletionRules or onSuccess and onFailure"),
    (
        {**rules(("DeleteSelf", AFTER)), "shutdownAfterJobFinishes": True},
        "deletionRules with shutdownAfterJobFinishes",
    ),
    (rules(("DeleteSelf", {"ttlSeconds": 9})), "not exactly one of jobStatus and jobDeploymentStatus"),
    (rules(("DeleteSelf", AFTER), ("DeleteSelf", AFTER)), "two deletion rules for the same"),
    (
        rules(("DeleteWorkers", {**AFTER, "ttlSeconds": 10}), ("DeleteCluster", AFTER)),
        "a cluster deleted before its workers",
    ),
    (
        {**rules(("DeleteWorkers", AFTER)), f"{CLUSTER}.enableInTreeAutoscaling": True},
        "DeleteWorkers with autoscaling",
    ),
    ({f"{CLUSTER}.authOptions.enableK8sTokenAuth": True}, "Kubernetes' own tokens for a job, or with a secret"),
    ({f"{CLUSTER}.rayVersion": "2.51.0"}, "token authentication before Ray 2.52"),
    ({f"{CLUSTER}.rayVersion": ""}, "token authentication before Ray 2.52"),
    ({f"{CLUSTER}.headGroupSpec.rayStartParams.num-cpus": "0"}, "resources in rayStartParams and in the group"),
    ({f"{GROUP}.rayStartParams.labels": "a=b"}, "labels in rayStartParams"),
    ({f"{GROUP}.minReplicas": 3}, "minReplicas greater than maxReplicas"),
    ({f"{GROUP}.maxReplicas": None}, "no minReplicas or maxReplicas without autoscaling"),
    ({f"{GROUP}.template.spec.containers": []}, "a group without a container"),
    ({f"{GROUP}.idleTimeoutSeconds": 60}, "a group's idleTimeoutSeconds without autoscaler v2"),
    (
        {f"{GROUP}.suspend": True, f"{CLUSTER}.enableInTreeAutoscaling": True},
        "a suspended group with autoscaling",
    ),
    ({f"{CLUSTER}.autoscalerOptions": {"idleTimeoutSeconds": -1}}, "idleTimeoutSeconds below 0"),
    (
        {
            f"{CLUSTER}.autoscalerOptions": {"version": "v2"},
            f"{CLUSTER}.enableInTreeAutoscaling": True,
            f"{GROUP}.template.spec.restartPolicy": "Always",
        },
        "autoscaler v2 and a restartPolicy",
    ),
    (
        {f"{CLUSTER}.headGroupSpec.template.spec.containers.0.env": [{"name": "RAY_enable_autoscaler_v2"}]},
        "autoscaler v2 by an environment variable",
    ),
]


def with_changes(manifest: Manifest, changes: dict[str, Any]) -> Manifest:
    changed = copy.deepcopy(manifest)
    for path, value in changes.items():
        *parents, last = path.split(".")
        node: Any = changed["spec"]
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node[part]
        node[last] = value
    return changed


@pytest.mark.parametrize(("changes", "complaint"), BROKEN)
def test_a_broken_rule_is_seen(changes: dict[str, Any], complaint: str) -> None:
    [good] = [each for each in documents("cpu-kind") if each["kind"] == "RayJob"]
    assert complaints(with_changes(good, changes)) == [complaint]


@pytest.mark.parametrize(
    ("overlay", "name", "complaint"),
    [
        ("cpu-kind", "a" * 48, "name too long"),
        ("interactive", "a" * 54, "name too long"),
        ("cpu-kind", "1b3", "name is no DNS-1035 label"),
        ("interactive", "a_b", "name is no DNS-1035 label"),
    ],
)
def test_a_name_that_it_cannot_take_is_seen(overlay: str, name: str, complaint: str) -> None:
    [good] = [each for each in documents(overlay) if each["kind"] in ("RayJob", "RayCluster")]
    assert complaints({**good, "metadata": {"name": name}}) == [complaint]


def test_kueue_gets_a_job_that_it_takes() -> None:
    [job] = documents("kueue")
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "ray-dwm"
    assert job["spec"]["shutdownAfterJobFinishes"]
    assert not job["spec"]["rayClusterSpec"].get("enableInTreeAutoscaling")
