"""What the manifests say exists in the code, and what they ask of Kubernetes is what the configured runs ask of Ray."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from functools import cache
from pathlib import Path

import pytest
import ray
from manifests import K8S, OVERLAYS, ROOT, Manifest, asked, cluster_spec, containers, documents, of_kind, pods, quantity
from ray._private import ray_constants
from ray.dashboard.consts import DASHBOARD_METRIC_PORT

from ray_dwm.orchestration import leaving
from ray_dwm.orchestration.cluster import fitting

RAY = of_kind("RayJob", "RayCluster")
JOBS = of_kind("RayJob")
IMAGE = re.compile(r"[\w./-]+:(?P<version>[\d.]+)-ray(?P<ray>[\d.]+)-py(?P<python>\d+)")
NCCL = {"NCCL_IB_HCA", "NCCL_SOCKET_IFNAME"}  # documented by NCCL, whose library need not be here
PORTS = {
    "gcs-server": ray_constants.DEFAULT_PORT,
    "dashboard": ray_constants.DEFAULT_DASHBOARD_PORT,
    "client": 10001,  # a literal of `ray start`, looked up below
    "metrics": 8080,  # where KubeRay has Ray export them
    "dash-metrics": DASHBOARD_METRIC_PORT,
}
OPERATORS_LABELS = {"app.kubernetes.io/name", "app.kubernetes.io/created-by"}
"""HeadServiceLabels of ray-operator/controllers/ray/common/service.go, v1.7.0; those of ray.io besides."""
DOCKERFILE = (K8S / "Dockerfile").read_text()


@cache
def code() -> str:
    """The sources of this package and of the parts of Ray that read variables which the manifests set."""
    library = Path(ray.__file__).parent
    folders = [ROOT / "ray_dwm", *(library / part for part in ("_common", "_private", "dashboard", "train"))]
    return "\n".join(path.read_text() for folder in folders for path in folder.rglob("*.py"))


def pinned(package: str) -> str:
    [version] = re.findall(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    return str(version)


@pytest.mark.parametrize(("overlay", "manifest"), RAY)
def test_every_variable_is_read_by_somebody(overlay: str, manifest: Manifest) -> None:
    for _, container in containers(manifest):
        names = {each["name"] for each in container.get("env", [])}
        assert {name for name in names - NCCL if f'"{name}"' not in code()} == set(), overlay


def test_a_variable_that_nobody_reads_is_seen() -> None:
    assert '"RAY_TRAIN_ENABLE_STATE_TRACKING"' in code() and '"RAY_TRAIN_ENABLE_STATE_TRACKINGS"' not in code()


@pytest.mark.parametrize(("overlay", "manifest"), RAY)
def test_every_port_is_one_of_rays(overlay: str, manifest: Manifest) -> None:
    for _, container in containers(manifest):
        for port in container.get("ports", []):
            assert PORTS[port["name"]] == port["containerPort"], overlay


def test_the_client_port_is_that_of_ray_start() -> None:
    assert str(PORTS["client"]) in (Path(ray.__file__).parent / "scripts/scripts.py").read_text()


def test_monitors_name_ports_that_the_pods_have() -> None:
    [job] = [each for each in documents("monitoring") if each["kind"] == "RayJob"]
    monitors = [each for each in documents("monitoring") if each["kind"] == "PodMonitor"]
    ports = {name: {port["name"] for port in each.get("ports", [])} for name, each in containers(job)}
    for monitor in monitors:
        labels = monitor["spec"]["selector"]["matchLabels"]
        pod = "head" if labels["ray.io/node-type"] == "head" else "gpu"
        assert {end["port"] for end in monitor["spec"]["podMetricsEndpoints"]} <= ports[pod]
        template = dict(pods(job))[pod]
        assert template["metadata"]["labels"].items() <= labels.items()
    assert len(monitors) == 2


@pytest.mark.parametrize(("overlay", "manifest"), RAY)
def test_no_pod_overrides_a_label_that_the_operators_services_select_by(overlay: str, manifest: Manifest) -> None:
    for name, template in pods(manifest):
        labels = template["metadata"]["labels"].keys()
        taken = [label for label in labels if label.startswith("ray.io/") or label in OPERATORS_LABELS]
        assert not taken, (overlay, name)


@pytest.mark.parametrize(("overlay", "manifest"), RAY)
def test_images_have_the_pinned_ray_and_this_package(overlay: str, manifest: Manifest) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    images = {container["image"] for _, container in containers(manifest)}
    [image] = images
    match = IMAGE.fullmatch(image)
    assert match, image
    python = f"{match['python'][0]}.{match['python'][1:]}"
    assert match["version"] == project["version"], overlay
    assert match["ray"] == pinned("ray") == cluster_spec(manifest)["rayVersion"]
    assert project["requires-python"] == f">={python}"


def test_the_image_is_built_on_the_pinned_ray_and_python() -> None:
    image = IMAGE.fullmatch(next(containers(JOBS[0][1]))[1]["image"])
    assert image
    stem = f"{image['ray']}-py{image['python']}"
    assert set(re.findall(r"RAY_TAG=(\S+)", DOCKERFILE)) == {f"{stem}-gpu", f"{stem}-cpu"}
    assert image[0] in DOCKERFILE
    assert "-c constraints.txt" in DOCKERFILE


@pytest.mark.parametrize(("overlay", "manifest"), JOBS)
def test_entrypoints_read_and_write_where_the_storage_is(overlay: str, manifest: Manifest) -> None:
    paths = asked(manifest["spec"]["entrypoint"]).paths  # it is parsed as the console does
    for _, container in containers(manifest):
        mounts = {mount["mountPath"] for mount in container.get("volumeMounts", [])}
        if "volumeMounts" in container:
            assert [path for path in paths if not any(path.startswith(mount + "/") for mount in mounts)] == [], overlay
            assert f"WORKDIR {container['workingDir']}\n" in DOCKERFILE
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not {"ray_dwm", "jobs", "configs", "corpus"} & set(ignored)


@pytest.mark.parametrize(("overlay", "manifest"), RAY)
def test_every_pod_has_time_to_save_a_checkpoint(overlay: str, manifest: Manifest) -> None:
    for name, template in pods(manifest):
        if name == "submitter":
            continue
        spec = template["spec"]
        python, module, path, pod, seconds = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert (python, module, pod) == ("python", "-m", "head" if name == "head" else "worker"), overlay
        assert importlib.util.find_spec(path).origin == leaving.__file__  # type: ignore[union-attr]
        assert 60 <= float(seconds.removeprefix("--seconds=")) < spec["terminationGracePeriodSeconds"]
    head = dict(containers(manifest))["head"]
    assert {each["name"]: each.get("value") for each in head["env"]}["RAY_JOB_STOP_WAIT_TIME_S"] == "270"


@pytest.mark.parametrize(("overlay", "manifest"), JOBS)
def test_pods_ask_for_what_the_run_asks_for(overlay: str, manifest: Manifest) -> None:
    needs = asked(manifest["spec"]["entrypoint"])
    [group] = manifest["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    [container] = group["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    pod = {"CPU": float(limits["cpu"]), "GPU": float(limits.get("nvidia.com/gpu", 0))}
    for replicas, need in ((group["minReplicas"], needs.least), (group["maxReplicas"], needs.most)):
        assert pod["GPU"] * replicas == need["GPU"], overlay
        assert (pod["CPU"] - 1) * replicas < need["CPU"] <= pod["CPU"] * replicas, "the fewest whole CPUs a pod"
    assert fitting([pod] * group["maxReplicas"], needs.bundle) >= needs.workers
    held = fitting([pod], needs.bundle) * needs.ingest_bytes
    assert held <= int(group["rayStartParams"]["object-store-memory"])
    assert group["minReplicas"] == group["replicas"]


@pytest.mark.parametrize(("overlay", "manifest"), RAY)
def test_pods_get_what_they_ask_for_and_no_more(overlay: str, manifest: Manifest) -> None:
    spec = cluster_spec(manifest)
    for name, container in containers(manifest):
        assert container["resources"]["requests"] == container["resources"]["limits"], overlay
        assert {"cpu", "memory", "ephemeral-storage"} <= container["resources"]["limits"].keys(), name
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        volumes = {each["name"]: each for each in pod["volumes"]}
        mounts = {each["mountPath"]: volumes[each["name"]] for each in pod["containers"][0]["volumeMounts"]}
        shared, limits = mounts["/dev/shm"]["emptyDir"], pod["containers"][0]["resources"]["limits"]
        assert shared["medium"] == "Memory"
        store, size = int(group["rayStartParams"]["object-store-memory"]), quantity(shared["sizeLimit"])
        # What lies in shared memory counts as the pod's; what does not fit there, Ray puts on disk.
        assert store < size <= 0.35 * quantity(limits["memory"])
        assert quantity(mounts["/tmp/ray"]["emptyDir"]["sizeLimit"]) < quantity(limits["ephemeral-storage"])


@pytest.mark.parametrize(("overlay", "manifest"), RAY)
def test_the_head_takes_drivers_and_nothing_else(overlay: str, manifest: Manifest) -> None:
    head = cluster_spec(manifest)["headGroupSpec"]
    assert head["resources"]["CPU"] == "0" and float(head["resources"]["train_driver"]) > 0, overlay
    assert not any("gpu" in key for key in head["template"]["spec"]["containers"][0]["resources"]["limits"])
    # A driver without resources of its own stays on the head.
    assert not any(key.startswith("entrypoint") and key != "entrypoint" for key in manifest["spec"])


@pytest.mark.parametrize(("overlay", "manifest"), RAY)
def test_nothing_runs_as_root_or_carries_a_secret(overlay: str, manifest: Manifest) -> None:
    for name, template in pods(manifest):
        spec = template["spec"]
        assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] == 1000, overlay
        autoscaled = name == "head" and cluster_spec(manifest).get("enableInTreeAutoscaling")
        assert autoscaled or spec["automountServiceAccountToken"] is False
        for container in spec["containers"]:
            assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            for each in container.get("env", []):
                assert not (re.search("KEY|TOKEN|SECRET|PASSWORD", each["name"]) and "value" in each), each["name"]
    assert cluster_spec(manifest)["authOptions"].keys() == {"mode", "secretName"}
    assert cluster_spec(manifest)["authOptions"]["mode"] == "token"
    assert not [each for each in documents(overlay) if each["kind"] == "Secret"]


@pytest.mark.parametrize(("overlay", "manifest"), JOBS)
def test_jobs_end_and_are_tried_again(overlay: str, manifest: Manifest) -> None:
    spec = manifest["spec"]
    assert spec["backoffLimit"] == 2 and spec["submitterConfig"] == {"backoffLimit": 0}, overlay
    assert 0 < spec["preRunningDeadlineSeconds"] < spec["activeDeadlineSeconds"]
    assert spec["shutdownAfterJobFinishes"] and spec["ttlSecondsAfterFinished"] > 0
    assert "jobId" not in spec and "runtimeEnvYAML" not in spec


@pytest.mark.parametrize("overlay", ["gpu-370m", "gpu-1b3", "autoscaling", "kueue", "rdma", "monitoring"])
def test_a_gpu_pod_has_a_node_to_itself(overlay: str) -> None:
    [job] = [each for each in documents(overlay) if each["kind"] == "RayJob"]
    [group] = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    pod = group["template"]["spec"]
    [term] = pod["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    assert term["topologyKey"] == "kubernetes.io/hostname"
    # ray.io/group is the operator's label.
    assert term["labelSelector"]["matchLabels"] == {**group["template"]["metadata"]["labels"], "ray.io/group": "gpu"}
    assert group["groupName"] == "gpu"
    assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in pod["tolerations"]


UNREMARKABLE = {"entrypoint", "rayClusterSpec", "submitterPodTemplate"}


def test_the_documents_table_has_every_setting() -> None:
    document = (ROOT / "docs/cluster.md").read_text()
    names = {
        each["name"]
        for _, manifest in RAY
        for _, container in containers(manifest)
        for each in container.get("env", [])
    }
    keys = {key for _, job in JOBS for key in job["spec"]} - UNREMARKABLE
    starts = {key for _, each in RAY for key in cluster_spec(each)["headGroupSpec"]["rayStartParams"]}
    rows = "".join(line for line in document.splitlines() if line.startswith("|"))
    assert [name for name in sorted(names | keys | starts) if f"`{name}" not in rows] == []
    assert [overlay for overlay in OVERLAYS if f"| `{overlay}` |" not in rows] == []


def test_rdma_is_asked_for_where_memory_may_be_locked() -> None:
    [job] = documents("rdma")
    container = dict(containers(job))["gpu"]
    assert container["resources"]["limits"]["rdma/rdma_shared_device_a"] == "1"
    assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]
    assert {each["name"] for each in container.get("env", [])} >= NCCL
