"""What KubeRay's operator refuses beyond its schemas: ray-operator/controllers/ray/utils/validation.go, v1.7.0.

Rules about features that no manifest here uses (GCS fault tolerance, TLS, network policies, history server) are left
out. Each rule takes a manifest and returns what is wrong with it, or nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from manifests import Manifest, cluster_spec
from packaging.version import Version

DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LONGEST_NAME = {"RayCluster": 53, "RayJob": 47}
START_RESOURCES = ("num-cpus", "num-gpus", "memory", "resources")
ORDER = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")


def complaints(manifest: Manifest) -> list[str]:
    """All that the operator would refuse."""
    found = [*_name(manifest), *_groups(cluster_spec(manifest)), *_autoscaling(cluster_spec(manifest))]
    found += _authentication(manifest)
    if manifest["kind"] == "RayJob":
        found += [*_job(manifest["spec"]), *_modes(manifest["spec"]), *_deletion(manifest["spec"])]
    return found


def _name(manifest: Manifest) -> Iterator[str]:
    name = manifest["metadata"]["name"]
    if len(name) > LONGEST_NAME[manifest["kind"]]:
        yield "name too long"
    if not DNS_1035.fullmatch(name):
        yield "name is no DNS-1035 label"


def _groups(spec: Manifest) -> Iterator[str]:
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        start = group.get("rayStartParams", {})
        if not group["template"]["spec"]["containers"]:
            yield "a group without a container"
        if group.get("resources") and any(start.get(key) for key in START_RESOURCES):
            yield "resources in rayStartParams and in the group"
        if "labels" in start:
            yield "labels in rayStartParams"
    for group in spec["workerGroupSpecs"]:
        least, most = group.get("minReplicas"), group.get("maxReplicas")
        if not spec.get("enableInTreeAutoscaling") and (least is None or most is None):
            yield "no minReplicas or maxReplicas without autoscaling"
        if least is not None and most is not None and not 0 <= least <= most:
            yield "minReplicas greater than maxReplicas"


def _autoscaling(spec: Manifest) -> Iterator[str]:
    options = spec.get("autoscalerOptions", {})
    second = bool(spec.get("enableInTreeAutoscaling")) and options.get("version") == "v2"
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    if second and any(group["template"]["spec"].get("restartPolicy", "Never") != "Never" for group in groups):
        yield "autoscaler v2 and a restartPolicy"
    for group in spec["workerGroupSpecs"]:
        if "idleTimeoutSeconds" in group and not second:
            yield "a group's idleTimeoutSeconds without autoscaler v2"
        if group.get("suspend") and spec.get("enableInTreeAutoscaling"):
            yield "a suspended group with autoscaling"
    if options.get("idleTimeoutSeconds", 0) < 0:
        yield "idleTimeoutSeconds below 0"
    head = spec["headGroupSpec"]["template"]["spec"]["containers"][0].get("env", [])
    if any(each["name"] == "RAY_enable_autoscaler_v2" for each in head):
        yield "autoscaler v2 by an environment variable"


def _authentication(manifest: Manifest) -> Iterator[str]:
    spec = cluster_spec(manifest)
    options = spec.get("authOptions", {})
    if options.get("mode") == "token" and Version(spec.get("rayVersion") or "0") < Version("2.52.0"):
        yield "token authentication before Ray 2.52"
    if options.get("enableK8sTokenAuth") and (manifest["kind"] == "RayJob" or options.get("secretName")):
        yield "Kubernetes' own tokens for a job, or with a secret"


def _job(spec: Manifest) -> Iterator[str]:
    shutdown = spec.get("shutdownAfterJobFinishes", False)
    if spec.get("suspend") and not shutdown:
        yield "suspended without shutdownAfterJobFinishes"
    if spec.get("ttlSecondsAfterFinished", 0) < 0:
        yield "ttlSecondsAfterFinished below 0"
    if spec.get("ttlSecondsAfterFinished", 0) > 0 and not shutdown:
        yield "ttlSecondsAfterFinished without shutdownAfterJobFinishes"
    for key in ("activeDeadlineSeconds", "preRunningDeadlineSeconds"):
        if spec.get(key, 1) <= 0:
            yield f"{key} not positive"
    if spec.get("backoffLimit", 0) < 0:
        yield "backoffLimit below 0"


def _modes(spec: Manifest) -> Iterator[str]:
    mode, retries = spec.get("submissionMode", "K8sJobMode"), spec.get("backoffLimit", 0)
    selector = spec.get("clusterSelector")
    if retries > 0 and (mode == "InteractiveMode" or selector):
        yield "backoffLimit in InteractiveMode or with clusterSelector"
    if selector and spec.get("suspend"):
        yield "suspended with clusterSelector"
    if mode == "SidecarMode" and (selector or spec.get("submitterPodTemplate") or spec.get("submitterConfig")):
        yield "SidecarMode with a submitter's settings or clusterSelector"


def _deletion(spec: Manifest) -> Iterator[str]:
    if "deletionStrategy" not in spec:
        return
    strategy = spec["deletionStrategy"]
    rules, legacy = strategy.get("deletionRules", []), "onSuccess" in strategy or "onFailure" in strategy
    if rules and spec.get("shutdownAfterJobFinishes"):
        yield "deletionRules with shutdownAfterJobFinishes"
    if bool(rules) == legacy:
        yield "not either deletionRules or onSuccess and onFailure"
    seconds: dict[tuple[str, str], dict[str, int]] = {}
    for rule in rules:
        states = [
            (key, rule["condition"][key]) for key in ("jobStatus", "jobDeploymentStatus") if key in rule["condition"]
        ]
        if len(states) != 1:
            yield "not exactly one of jobStatus and jobDeploymentStatus"
            continue
        if rule["policy"] == "DeleteWorkers" and spec["rayClusterSpec"].get("enableInTreeAutoscaling"):
            yield "DeleteWorkers with autoscaling"
        of_state = seconds.setdefault(states[0], {})
        if rule["policy"] in of_state:
            yield "two deletion rules for the same"
        of_state[rule["policy"]] = rule["condition"].get("ttlSeconds", 0)
    for of_state in seconds.values():
        times = [of_state[policy] for policy in ORDER if policy in of_state]
        if times != sorted(times):
            yield "a cluster deleted before its workers"
