"""What every node has, asked by a small task on each, and what follows from it: versions, GPUs, clocks, limits.

`node_facts` runs on a node; everything else is a pure function of its answers.
"""

from __future__ import annotations

import importlib.metadata
import netrc
import os
import platform
import resource
import shutil
import socket
import subprocess
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

import ray
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import ray_dwm
from ray_dwm.config import RunConfig
from ray_dwm.orchestration.findings import Finding, count

LEAST_OPEN_FILES = 8192
"""What Ray recommends for `ulimit -n`; a worker, its streams and its process group hold hundreds of sockets."""
MOST_SKEW_S = 5.0
SPILL_LIMIT = 0.95
"""Ray writes nothing more to a disk that is fuller than this (local_fs_capacity_threshold)."""
_SHOWN = ("torch", "ray", "transformers", "pyarrow", "safetensors", "wandb")
_PROXIES = ("grpc_proxy", "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One GPU, as its driver names it."""

    name: str
    memory_mib: int
    driver: str
    compute_capability: str


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeFacts:
    """One node, as a process of Ray on it sees it."""

    host: str
    address: str
    python: str
    packages: dict[str, str]
    """Installed version of every package that ray_dwm requires; those that are missing have none."""
    gpus: tuple[Gpu, ...]
    cores: int
    open_files: int
    shm_bytes: int
    tmp_free_bytes: int
    tmp_total_bytes: int
    wandb_key: bool
    traps: tuple[Finding, ...]
    resources: dict[str, float]
    """What Ray counts on this node."""
    skew_s: float = 0.0
    """Seconds by which its clock certainly differs from the driver's."""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.host} ({self.address})"


def node_facts(packages: Sequence[str], resources: dict[str, float]) -> NodeFacts:
    """Look at the node that this runs on; imports no torch, so that it is quick."""
    address = ray.util.get_node_ip_address()
    tmp = shutil.disk_usage(ray._private.worker._global_node.get_session_dir_path())
    return NodeFacts(
        host=socket.gethostname(),
        address=address,
        python=platform.python_version(),
        packages={name: version for name in packages if (version := installed_version(name))},
        gpus=_gpus(),
        cores=os.cpu_count() or 1,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        shm_bytes=shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else 0,
        tmp_free_bytes=tmp.free,
        tmp_total_bytes=tmp.total,
        wandb_key=_has_wandb_key(),
        traps=traps(os.environ, address),
        resources=resources,
    )


def installed_version(package: str) -> str | None:
    """Version of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpus() -> tuple[Gpu, ...]:
    """Asked of the driver: torch would only show those that Ray gave to this process."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version,compute_cap", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines() if line.strip()]
    return tuple(
        Gpu(name=name, memory_mib=int(memory), driver=driver, compute_capability=capability)
        for name, memory, driver, capability in rows
    )


def traps(environment: Mapping[str, str], address: str) -> tuple[Finding, ...]:
    """Variables that are known to break runs, among those of a process on the node with this address."""
    found = []
    if environment.get("RAY_TRAIN_V2_ENABLED", "1").lower() in ("0", "false"):
        remedy = "unset RAY_TRAIN_V2_ENABLED: ray_dwm is written for Ray Train V2"
        found.append(Finding("environment", "failed", "RAY_TRAIN_V2_ENABLED is off", remedy))
    excepted = environment.get("no_proxy", "") + "," + environment.get("NO_PROXY", "")
    proxies = [name for name in _PROXIES if environment.get(name) and address not in excepted and "*" not in excepted]
    if proxies:
        message = f"{', '.join(proxies)}: gRPC between the nodes may go through a proxy"
        found.append(Finding("environment", "warning", message, "add the nodes' addresses to no_proxy"))
    present = [name for _, name in socket.if_nameindex()]
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        wanted = environment.get(variable, "")
        # A list of names; NCCL also takes beginnings, "=" for whole names and "^" for what to leave out.
        names = [] if wanted.startswith("^") else [name for name in wanted.lstrip("=").split(",") if name]
        if names and not any(have.startswith(name) for name in names for have in present):
            message = f"{variable}={wanted}, and there is no such network interface"
            found.append(Finding("environment", "failed", message, f"name one of {', '.join(present)}, or unset it"))
    return tuple(found)


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def requirements() -> tuple[str, list[Requirement]]:
    """(range of Python, ranges of packages) that ray_dwm asks for: of the installation, or else of the source tree."""
    try:
        metadata = importlib.metadata.metadata("ray-dwm")
        python, lines = metadata["Requires-Python"], metadata.get_all("Requires-Dist") or []
    except importlib.metadata.PackageNotFoundError:
        path = Path(ray_dwm.__file__).parents[1] / "pyproject.toml"
        project = tomllib.loads(path.read_text())["project"]
        python, lines = project["requires-python"], project["dependencies"]
    wanted = [Requirement(line) for line in lines]
    return python, [r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]


def check_versions(python: str, wanted: Sequence[Requirement], have_python: str, have: dict[str, str]) -> Finding:
    """The driver's versions against the ranges that were tested."""
    wrong = [] if SpecifierSet(python).contains(have_python) else [f"python {have_python} is not {python}"]
    for package in wanted:
        version = have.get(package.name)
        if version is None:
            wrong.append(f"{package.name} is not installed")
        elif not package.specifier.contains(version, prereleases=True):
            wrong.append(f"{package.name} {version} is not {package.specifier}")
    if wrong:
        return Finding(
            "versions",
            "failed",
            "; ".join(wrong),
            "install ray_dwm anew with its dependencies; constraints.txt lists versions that work together",
        )
    shown = [f"{name} {have[name]}" for name in _SHOWN if name in have]
    return Finding("versions", "ok", ", ".join([f"python {have_python}", *shown]))


def check_same_versions(have_python: str, have: dict[str, str], nodes: Sequence[NodeFacts]) -> Finding:
    """All nodes against the driver: pickles and collectives cross between them."""
    check, different = "versions on nodes", []
    for node in nodes:
        pairs = [("python", _minor(have_python), _minor(node.python))]
        pairs += [(name, version, node.packages.get(name, "none")) for name, version in have.items()]
        differs = [f"{name} {there} (here {here})" for name, here, there in pairs if here != there]
        if differs:
            different.append(f"{node.name}: {', '.join(differs)}")
    if different:
        remedy = "give all nodes one image or one lock file (constraints.txt)"
        return Finding(check, "failed", "; ".join(different), remedy)
    return Finding(check, "ok", f"the same on {count(len(nodes), 'node')}")


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def check_gpus(nodes: Sequence[NodeFacts], config: RunConfig | None) -> Finding:
    """What each node's driver shows and Ray counts, against what the run asks for."""
    check, shown = "GPUs", "; ".join(f"{node.name}: {_kinds(node.gpus)}" for node in nodes if node.gpus)
    of_dwm = config.cluster.dwm_gpus if config is not None and config.learns_dwm else 0.0
    wanted = of_dwm + (config.cluster.gpus_per_worker if config is not None else 0.0)
    if config is not None and not wanted:
        if shown:
            return Finding(check, "warning", f"{shown}; the run uses none", "cluster.gpus_per_worker=1")
        return Finding(check, "ok", "none, and none is asked for")
    differ = [node for node in nodes if not _same_number(len(node.gpus), node.resources.get("GPU", 0.0))]
    if differ:
        each = [f"{n.name}: nvidia-smi shows {len(n.gpus)}, Ray counts {n.resources.get('GPU', 0.0):g}" for n in differ]
        remedy = "mend the driver there, or start Ray with --num-gpus and as many as there are"
        return Finding(check, "warning", "; ".join(each), remedy)
    if wanted and not shown:
        remedy = (
            "name the cluster that has them (RAY_ADDRESS, or a Ray job), add nodes with GPUs and their driver, or set "
            "cluster.gpus_per_worker=0 and cluster.dwm_gpus=0"
        )
        return Finding(check, "failed", "no node has one, the run asks for GPUs", remedy)
    if wanted and len({gpu.name for node in nodes for gpu in node.gpus}) > 1:
        return Finding(check, "warning", shown, "let all workers run on one kind: the slowest sets the pace")
    return Finding(check, "ok", shown or "none")


def _kinds(gpus: Sequence[Gpu]) -> str:
    kinds = {gpu: gpus.count(gpu) for gpu in gpus}
    return ", ".join(
        f"{number} x {gpu.name} ({gpu.memory_mib / 1024:.0f} GiB, driver {gpu.driver}, capability "
        f"{gpu.compute_capability})"
        for gpu, number in kinds.items()
    )


def _same_number(shown: int, counted: float) -> bool:
    """Ray may be given a part of a node's GPUs, but neither none of them nor more than there are."""
    return counted <= shown and (counted > 0 or shown == 0)


def check_limits(nodes: Sequence[NodeFacts]) -> list[Finding]:
    """Open files, /dev/shm against the object store, and the disk to which Ray spills."""
    few = [f"{n.name}: {n.open_files}" for n in nodes if 0 <= n.open_files < LEAST_OPEN_FILES]
    if few:
        files = Finding("open files", "warning", "; ".join(few), f"ulimit -n {8 * LEAST_OPEN_FILES} before `ray start`")
    else:
        files = Finding("open files", "ok", f"at least {LEAST_OPEN_FILES} on {count(len(nodes), 'node')}")
    return [files, _check_spill(nodes)]


def _check_spill(nodes: Sequence[NodeFacts]) -> Finding:
    full = [n for n in nodes if n.tmp_free_bytes < (1 - SPILL_LIMIT) * n.tmp_total_bytes]
    shown = [f"{n.name}: {n.tmp_free_bytes / 2**30:.1f} of {n.tmp_total_bytes / 2**30:.1f} GiB free" for n in nodes]
    if full:
        remedy = (
            "free space there, or start Ray with --temp-dir on a larger disk: Ray writes nothing to a disk that full"
        )
        return Finding("Ray's temporary disk", "failed", "; ".join(shown), remedy)
    return Finding("Ray's temporary disk", "ok", "; ".join(shown))


def check_traps(here: Sequence[Finding], nodes: Sequence[NodeFacts]) -> list[Finding]:
    """The driver's and the nodes' traps; the same one on several nodes is one row."""
    places: dict[Finding, list[str]] = {}
    for name, found in [("this process", here), *((node.name, node.traps) for node in nodes)]:
        for trap in found:
            places.setdefault(trap, []).append(name)
    rows = [replace(trap, found=f"{trap.found} ({', '.join(names)})") for trap, names in places.items()]
    return rows or [Finding("environment", "ok", "no variable that is known to break runs")]


def check_clocks(nodes: Sequence[NodeFacts]) -> Finding:
    """Each node's clock against the driver's."""
    late = [f"{node.name}: {node.skew_s:.0f} s" for node in nodes if node.skew_s > MOST_SKEW_S]
    if late:
        return Finding("clocks", "warning", f"differ from here: {'; '.join(late)}", "run an NTP client on all nodes")
    return Finding("clocks", "ok", f"within {MOST_SKEW_S:g} s on {count(len(nodes), 'node')}")


def check_wandb(config: RunConfig, nodes: Sequence[NodeFacts]) -> Finding:
    """Rank 0 may run on any node, so each needs the key."""
    mode = config.tracking.wandb
    without = [node.name for node in nodes if not node.wandb_key]
    if mode == "online" and without:
        remedy = "give WANDB_API_KEY to the nodes or to the job, or set tracking.wandb=offline"
        return Finding("W&B", "failed", f"tracking.wandb=online, no key on {', '.join(without)}", remedy)
    if mode == "auto":
        mode = "auto: offline, no WANDB_API_KEY on a node" if without else "auto: online where WANDB_API_KEY is set"
    return Finding("W&B", "ok", mode)
