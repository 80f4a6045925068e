"""What only trying tells: nodes that answer, kernels on their devices, a process group, a folder seen from everywhere.

Every wait here has an end, and whatever was started is stopped at it.
"""

from __future__ import annotations

import atexit
import os
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from ray_dwm.config import RunConfig
from ray_dwm.data.filesystem import lacking
from ray_dwm.data.manifest import file_sha256
from ray_dwm.engine.selftest import AttentionProbe, GroupProbe, probe_attention, probe_group
from ray_dwm.errors import ResourceError
from ray_dwm.orchestration.cluster import alive_nodes, fitting, worker_bundle
from ray_dwm.orchestration.doctor_nodes import NodeFacts, node_facts
from ray_dwm.orchestration.findings import Finding, count, failure
from ray_dwm.orchestration.storage_visit import appears, visit

_BUSY = "wait until the cluster is less busy, or ask for less (cluster.*)"
_NETWORK = "let nodes reach each other on all ports; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the network to use"


def on_nodes(
    check: str,
    nodes: Sequence[dict[str, Any]],
    function: Callable[..., Any],
    arguments: Callable[[dict[str, Any]], tuple[Any, ...]],
    limit_s: float,
    bundle: dict[str, float] | None = None,
) -> tuple[list[tuple[dict[str, Any], Any]], list[Finding]]:
    """(node, answer) of each node that answers, and a failed row for each that does not."""
    bundle = bundle or {}
    cpus, gpus = bundle.get("CPU", 0), bundle.get("GPU", 0)
    task, references = ray.remote(function), {}
    for node in nodes:
        place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        placed = task.options(num_cpus=cpus, num_gpus=gpus, scheduling_strategy=place, max_retries=0)
        references[placed.remote(*arguments(node))] = node
    if references:  # Ray refuses to wait for nothing
        ray.wait(list(references), num_returns=len(references), timeout=limit_s, fetch_local=False)
    answers, rows = [], []
    for reference, node in references.items():
        try:
            answers.append((node, ray.get(reference, timeout=1)))
        except ray.exceptions.GetTimeoutError:
            ray.cancel(reference, force=True)
            rows.append(Finding(check, "failed", f"{_name(node)} did not answer within {limit_s:g} s", _BUSY))
        except Exception as error:
            row = failure(check, error)
            rows.append(replace(row, found=f"{_name(node)}: {row.found}"))
    return answers, rows


def _name(node: dict[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


def ask_nodes(packages: Sequence[str], limit_s: float) -> tuple[list[NodeFacts], list[Finding]]:
    """The facts of every node that answers; clocks are compared when its process is warm."""
    nodes = alive_nodes()
    answers, rows = on_nodes("nodes", nodes, node_facts, lambda node: (packages, node["Resources"]), limit_s)
    facts = []
    for node, found in answers:
        before = time.time()
        clocks, _ = on_nodes("clocks", [node], _clock, lambda _: (), 10)
        after = time.time()
        there = clocks[0][1] if clocks else before
        facts.append(replace(found, skew_s=max(before - there, there - after, 0.0)))
    return facts, rows


def _clock() -> float:
    return time.time()


def check_attention(
    config: RunConfig, head_dim: int, seq_len: int, free: dict[str, dict[str, float]], limit_s: float
) -> list[Finding]:
    """Try the attention kernels on every node that can hold a worker; one row for each kind of device.

    Args:
        free: node's ID -> resources that nobody holds there; where a worker finds no room, nothing is tried.
    """
    bundle, precision = worker_bundle(config), config.train.precision
    nodes = [node for node in alive_nodes() if fitting([node["Resources"]], bundle)]
    if not nodes:
        return [Finding("attention", "skipped", "no node can hold a worker")]
    with_room = [node for node in nodes if fitting([free.get(node["NodeID"], {})], bundle)]
    shape = {"head_dim": head_dim, "seq_len": seq_len, "precision": precision}
    answers, rows = on_nodes("attention", with_room, _attention, lambda _: (shape,), limit_s, bundle)
    if len(with_room) < len(nodes):
        found = f"others hold what a worker needs on {len(nodes) - len(with_room)} of {count(len(nodes), 'node')}"
        rows.append(Finding("attention", "skipped", found))
    probes = dict.fromkeys(probe for _, probe in answers)
    about = f"heads of {head_dim}, {seq_len} tokens, {precision}"
    return [*(judge_attention(probe, config, about) for probe in probes), *rows]


def _attention(shape: dict[str, Any]) -> AttentionProbe:
    return probe_attention(**shape)


def judge_attention(probe: AttentionProbe, config: RunConfig, about: str) -> Finding:
    """What a probe means for lm.attention and bilevel.estimator."""
    choice, estimator = config.lm.attention, config.bilevel.estimator
    forward = f"with a forward derivative (jvp): {', '.join(probe.forward_mode) or 'none'}"
    picks = {"auto": probe.auto, "eager": "no kernel"}.get(choice, choice)
    found = f"{probe.device}, {about}: {', '.join(probe.trains) or 'none'} run, {forward}; lm.attention={choice} takes "
    found += picks + ("" if "math" in probe.forward_mode else "; bilevel.estimator=jvp and exact cannot work")
    if choice not in ("auto", "eager") and choice not in probe.trains:
        return Finding("attention", "failed", found, f"lm.attention={probe.auto}, or auto")
    if config.learns_dwm and estimator in ("jvp", "exact") and "math" not in probe.forward_mode:
        return Finding("attention", "failed", found, "bilevel.estimator=ghost_lowrank")
    if choice != "eager" and not probe.trains:
        return Finding("attention", "failed", found, "lm.attention=eager, or another build of torch for this device")
    return Finding("attention", "ok", found)


class _Rank:
    """One process of the group."""

    def place(self) -> tuple[str, str, list[str], int]:
        """(node, address, GPUs, a free port)."""
        context = ray.get_runtime_context()
        with socket.socket() as probe:
            probe.bind(("", 0))
            port = int(probe.getsockname()[1])
        gpus = context.get_accelerator_ids().get("GPU", [])
        return context.get_node_id(), ray.util.get_node_ip_address(), gpus, port

    def run(self, environment: dict[str, str], shard: int, timeout_s: float) -> GroupProbe:
        """Join the group and try it."""
        os.environ.update(environment)
        return probe_group(shard, timeout_s)


def check_group(config: RunConfig, workers: int, limit_s: float) -> list[Finding]:
    """A process group of the run's workers, in processes that hold their resources."""
    check, deadline = "process group", time.monotonic() + limit_s
    group = placement_group([worker_bundle(config)] * workers, strategy="PACK")
    ranks: list[Any] = []
    try:
        if not group.wait(limit_s / 3):
            found = (
                f"{workers} workers found no free place within {limit_s / 3:g} s, though the cluster could hold them"
            )
            return [Finding(check, "failed", found, _BUSY)]
        place = PlacementGroupSchedulingStrategy(group)
        bundle = worker_bundle(config)
        options = {"num_cpus": bundle["CPU"], "num_gpus": bundle["GPU"], "scheduling_strategy": place}
        ranks = [ray.remote(_Rank).options(**options, max_restarts=0).remote() for _ in range(workers)]
        places = ray.get([rank.place.remote() for rank in ranks], timeout=deadline - time.monotonic())
        # By nodes, as Ray Train numbers them: neighbours share a copy of the LM.
        order = sorted(range(workers), key=lambda i: places[i][0])
        ranks, places = [ranks[i] for i in order], [places[i] for i in order]
        timeout_s = max(5.0, (deadline - time.monotonic()) / 2)
        references = [
            rank.run.remote(environment, config.parallel.shard, timeout_s)
            for rank, environment in zip(ranks, group_environments(places), strict=True)
        ]
        return [judge_group(ray.get(references, timeout=max(1.0, deadline - time.monotonic()))[0])]
    except ray.exceptions.GetTimeoutError:
        return [Finding(check, "failed", f"{workers} processes did not come together within {limit_s:g} s", _NETWORK)]
    except ray.exceptions.RayTaskError as error:
        return [replace(failure(check, error), remedy=_NETWORK)]
    finally:
        for rank in ranks:
            ray.kill(rank)
        remove_placement_group(group)


def group_environments(places: Sequence[tuple[str, str, list[str], int]]) -> list[dict[str, str]]:
    """What each rank is told. As in Ray Train, the workers of a node see each other's GPUs: NCCL copies between them.

    Args:
        places: (node, address, GPUs, a free port) of each rank.
    """
    shared = {"MASTER_ADDR": places[0][1], "MASTER_PORT": str(places[0][3]), "WORLD_SIZE": str(len(places))}
    environments = []
    for rank, (node, _, gpus, _) in enumerate(places):
        there = [place for place in places if place[0] == node]
        local = sum(place[0] == node for place in places[:rank])
        visible = list(dict.fromkeys(gpu for place in there for gpu in place[2]))
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(visible.index(gpus[0]) if gpus else local)}
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible)
        environments.append(environment)
    return environments


def judge_group(probe: GroupProbe) -> Finding:
    """What a group's figures mean."""
    sums = "right" if probe.sum_is_right else "WRONG"
    found = (
        f"{probe.world} x {probe.device} over {probe.backend}: all-reduce {sums}, "
        f"{probe.bytes_per_s / 1e9:.2f} GB/s; one FSDP2 step differs from the unsharded one by {probe.fsdp_error:.0e}"
    )
    if probe.sum_is_right and probe.fsdp_error < 1e-4:
        return Finding("process group", "ok", found)
    remedy = (
        "run nccl-tests or the same with NCCL_P2P_DISABLE=1 to find the link, and do not train here until it is mended"
    )
    return Finding("process group", "failed", found, remedy)


def check_storage(storage: Path, inputs: Sequence[Path], limit_s: float) -> list[Finding]:
    """Write a file where the runs go, let every node read it and write its own, and read those; nothing stays.

    Args:
        storage: folder of run folders; made, and removed again, where it does not exist.
        inputs: files that every node must see with the content they have here.
    """
    token, made = secrets.token_hex(8), [p for p in (storage, *storage.parents) if not p.exists()]
    folder = storage / f".doctor-{token}"
    # A check that is cut off (Ctrl-C, its limit) ends with the process, and runs no `finally`.
    atexit.register(_remove, folder, made)
    try:
        folder.mkdir(parents=True)
        if lack := lacking(folder):
            return [
                Finding("storage", "failed", f"{storage} cannot {lack}", "use a file system that can (NFS, Lustre)")
            ]
        (folder / "driver").write_text(token)
        digests = {str(path): file_sha256(path) for path in inputs}
        answers, rows = on_nodes(
            "storage", alive_nodes(), visit, lambda node: (str(folder), node["NodeID"], token, digests), limit_s
        )
        for node, problems in answers:
            # A node that says what is wrong is not waited for: a hundred of them would take the check's whole time.
            if not problems and not appears(folder / node["NodeID"], token):
                problems = [f"what it wrote to {storage} is not seen here"]
            if problems:
                remedy = "mount one shared file system at the same path on all nodes, and put storage and data there"
                rows.append(Finding("storage", "failed", f"{_name(node)}: {'; '.join(problems)}", remedy))
        if not rows:
            seen = f"written and read by {count(len(answers), 'node')}: {storage}"
            same = f"; with the same {count(len(inputs), 'data file')}" if inputs else ""
            rows.append(Finding("storage", "ok", seen + same))
        return rows
    except OSError as error:
        raise ResourceError(f"{storage} cannot be written ({error.strerror}): choose another storage=...") from None
    finally:
        _remove(folder, made)


def _remove(folder: Path, made: Sequence[Path]) -> None:
    """The probe's folder and those folders above it that were made for it."""
    atexit.unregister(_remove)
    if folder.is_dir():
        for path in folder.iterdir():
            path.unlink(missing_ok=True)
        folder.rmdir()
    for path in made:
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
