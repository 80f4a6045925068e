"""The committed renderings: fresh, and valid by the schemas of KubeRay's and Kubernetes' own kinds."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from jsonschema import Draft202012Validator
from manifests import K8S, OVERLAYS, RENDERED, ROOT, Manifest, documents, of_kind, pods

SCHEMAS = ROOT.parent / "shared/schemas/kuberay"
KUBERNETES = "1.32"
RAY = of_kind("RayJob", "RayCluster")


def sources() -> set[str]:
    found = [path for path in K8S.rglob("*.yaml") if RENDERED not in path.parents]
    return {str(path.relative_to(ROOT)) for path in [*found, *(K8S / "monitoring").glob("*.json")]}


def test_the_renderings_are_of_these_sources() -> None:
    recorded = dict(line.split()[::-1] for line in (RENDERED / "SOURCES.sha256").read_text().splitlines())
    now = {source: hashlib.sha256((ROOT / source).read_bytes()).hexdigest() for source in sources()}
    assert now == recorded, "the manifests have changed since they were rendered: `make k8s`"
    assert sorted(path.stem for path in RENDERED.glob("*.yaml")) == OVERLAYS


def rendered(overlay: Path) -> str:
    if not shutil.which("kubectl"):
        pytest.skip("there is no kubectl: only the sources' digests were compared")
    command = ["kubectl", "kustomize", str(overlay)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_kubectl_renders_the_same(overlay: str) -> None:
    now = list(yaml.safe_load_all(rendered(K8S / "overlays" / overlay)))
    assert now == documents(overlay), "the renderings are stale: `make k8s`"


@pytest.mark.parametrize(
    ("overlay", "unused"), [("cpu-kind", {"claim"}), ("gpu-1b3", set[str]()), ("interactive", set[str]())]
)
def test_image_storage_and_secrets_are_all_that_a_site_changes(overlay: str, unused: set[str], tmp_path: Path) -> None:
    site = yaml.safe_load((K8S / "base/site.yaml").read_text())
    before, names = (RENDERED / f"{overlay}.yaml").read_text(), site["data"].items()
    shutil.copytree(K8S, tmp_path / "k8s")
    ours = {key: f"example/{key}:1" if key == "image" else f"our-{key}".replace("_", "-") for key, _ in names}
    (tmp_path / "k8s/base/site.yaml").write_text(yaml.safe_dump({**site, "data": ours}))
    expected = before
    assert {key for key, name in names if name not in before} == unused, "nothing takes these from site.yaml"
    for key, name in names:
        expected = expected.replace(name, ours[key])
    after = rendered(tmp_path / "k8s/overlays" / overlay)
    assert list(yaml.safe_load_all(after)) == list(yaml.safe_load_all(expected))


def test_no_overlay_makes_or_takes_away_the_claim_of_a_site() -> None:
    site = yaml.safe_load((K8S / "base/site.yaml").read_text())["data"]["claim"]
    made = {each["metadata"]["name"] for _, each in of_kind("PersistentVolumeClaim")}
    assert made == {"ray-dwm-quickstart"} and site not in made


@pytest.mark.parametrize(("overlay", "manifest"), RAY, ids=lambda each: each if isinstance(each, str) else each["kind"])
def test_kuberay_would_take_them(overlay: str, manifest: Manifest) -> None:
    path = SCHEMAS / f"{manifest['kind'].lower()}.schema.json"
    if not path.exists():
        pytest.skip(f"KubeRay's schemas are not beside the checkout ({SCHEMAS})")
    del overlay
    assert manifest["apiVersion"] == "ray.io/v1"
    errors = Draft202012Validator(json.loads(path.read_text())).iter_errors(manifest)
    assert [f"{error.json_path}: {error.message}" for error in errors] == []


@pytest.mark.parametrize(("overlay", "manifest"), RAY, ids=lambda each: each if isinstance(each, str) else each["kind"])
def test_kubernetes_would_take_their_pods(overlay: str, manifest: Manifest) -> None:
    del overlay
    for name, template in pods(manifest):
        pod = {"apiVersion": "v1", "kind": "Pod", **template, "metadata": {"name": name, **template["metadata"]}}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_kubernetes_would_take_the_rest() -> None:
    core = [each for overlay in OVERLAYS for each in documents(overlay) if "." not in each["apiVersion"]]
    assert {each["kind"] for each in core} >= {"PersistentVolumeClaim"}
    for each in core:
        kubernetes_validate.validate(each, KUBERNETES, strict=True)


@pytest.mark.parametrize("change", [("imagePullPolicy", 1), ("imagPullPolicy", "Always")])
def test_a_wrong_pod_is_seen(change: tuple[str, object]) -> None:
    _, template = next(pods(of_kind("RayJob")[0][1]))
    container = {**template["spec"]["containers"][0], change[0]: change[1]}
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {"containers": [container]}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_a_folder_is_one_overlay() -> None:
    assert [name for name in OVERLAYS if not (Path(K8S / "overlays" / name) / "kustomization.yaml").exists()] == []
