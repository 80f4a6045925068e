"""The rendered manifests, and what the tests ask of them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from ray_dwm.config import load
from ray_dwm.config.tune import load_tune, scale_config
from ray_dwm.orchestration.cluster import needed, worker_bundle

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
RENDERED = K8S / "rendered"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())
SUFFIXES = {"": 1, "m": 1e-3, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}

Manifest = dict[str, Any]


@cache
def documents(overlay: str) -> list[Manifest]:
    """An overlay's manifests; shared, so not to be changed."""
    return [each for each in yaml.safe_load_all((RENDERED / f"{overlay}.yaml").read_text()) if each]


def of_kind(*kinds: str) -> list[tuple[str, Manifest]]:
    """Overlay and manifest of all that are of some kinds."""
    return [(overlay, each) for overlay in OVERLAYS for each in documents(overlay) if each["kind"] in kinds]


def cluster_spec(manifest: Manifest) -> Manifest:
    """The spec of a RayCluster, or of a RayJob's."""
    spec: Manifest = manifest["spec"]
    return spec["rayClusterSpec"] if manifest["kind"] == "RayJob" else spec


def pods(manifest: Manifest) -> Iterator[tuple[str, Manifest]]:
    """Name and template of every pod that a manifest makes, but for those of the operator's own."""
    spec = cluster_spec(manifest)
    yield "head", spec["headGroupSpec"]["template"]
    for group in spec["workerGroupSpecs"]:
        yield group["groupName"], group["template"]
    if manifest["kind"] == "RayJob":
        yield "submitter", manifest["spec"]["submitterPodTemplate"]


def containers(manifest: Manifest) -> Iterator[tuple[str, Manifest]]:
    """Pod's name and container."""
    for name, template in pods(manifest):
        for container in template["spec"]["containers"]:
            yield name, container


def quantity(text: str) -> float:
    """A Kubernetes quantity as a number, in bytes or cores."""
    digits = text.rstrip("mKMGi")
    return float(digits) * SUFFIXES[text[len(digits) :]]


@dataclass(frozen=True)
class Asked:
    """What an entrypoint asks of the cluster: logical resources at least and at most, and a worker's bundle."""

    least: Mapping[str, float]
    most: Mapping[str, float]
    bundle: Mapping[str, float]
    workers: int
    """Of one run, at most."""
    ingest_bytes: float
    """Object store of one worker."""
    paths: tuple[str, ...]
    """Where it reads and writes."""


def asked(entrypoint: str) -> Asked:
    """Parse an entrypoint as the console does."""
    python, script, *words = shlex.split(entrypoint)
    assert python == "python"
    if script == "jobs/tune.py":
        option, file, *overrides = words
        assert option == "--config"
        sweep = load_tune(ROOT / file, overrides)
        runs, times = [scale_config(sweep, scale) for scale in sweep.scales], sweep.concurrent
    else:
        assert script == "jobs/train.py"
        files = [ROOT / words[place + 1] for place, word in enumerate(words) if word == "--config"]
        runs, times = [load(files, [word for word in words if "=" in word])], 1
    run = max(runs, key=lambda run: needed(run, run.cluster.most_workers)["CPU"])
    folders = [run.storage, run.data.train, run.data.target, *run.data.held_out.values()]
    amounts = [needed(run, workers) for workers in (run.cluster.least_workers, run.cluster.most_workers)]
    least, most = ({kind: times * amount for kind, amount in each.items()} for each in amounts)
    return Asked(
        least, most, worker_bundle(run), run.cluster.most_workers, run.cluster.ingest_memory_mb * 2**20, tuple(folders)
    )
