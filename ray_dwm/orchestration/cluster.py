"""Joining or starting a Ray cluster, and what is checked before anything runs on it."""

from __future__ import annotations

import logging
import math
import os
import re
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import ray.data
import ray.util.client
from ray._private.services import canonicalize_bootstrap_address
from ray._private.state import available_resources_per_node
from ray.exceptions import AuthenticationError

from ray_dwm.config import RunConfig
from ray_dwm.errors import ResourceError
from ray_dwm.logs import in_job, in_json, say

NAMESPACE = "ray_dwm"
DRIVER_HEADROOM_CPUS = 1
"""Logical CPUs that Ray Data's read tasks and the controller may use beside workers and actor."""
SLIVER_CPUS = 0.01
"""Of a trial's driver where no place is meant for drivers: it waits for others nearly all the time."""
_PROBE_TIMEOUT_S = 10.0
_KEEP_MEMORY = {
    "THP_MEM_ALLOC_ENABLE": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(2**40),
    "MALLOC_ARENA_MAX": "1",  # Ray Train runs the loop in a thread, whose own arena would give memory back all the same
}
"""Have PyTorch ask for huge pages, and glibc keep what is freed: else an LM on a CPU takes its activations anew from
the kernel, page by page, at every step (benchmarks/allocator.py)."""


def connect(config: RunConfig, at_once: int = 1) -> None:
    """Join the cluster that RAY_ADDRESS (or the Ray job) names; without one, start one of this machine's size.

    A local cluster gets as many logical CPUs as the run asks for, so that a laptop can run it.

    Args:
        at_once: such runs at the same time.

    Raises:
        ResourceError: no cluster at the address, or one that wants a token or has other versions.
    """
    quiet_ray_data()
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "namespace": NAMESPACE}
    if in_json():  # what Ray itself says here and in the workers
        quiet["logging_config"] = ray.LoggingConfig(encoding="JSON", log_level="ERROR")
    # Workers import the package from where the driver did, also when it runs from a source tree.
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}}
    try:
        if address:
            probe(address)
            ray.init(address=address, **quiet)
        else:
            os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # a private cluster on the loopback device
            os.environ.update(_keep_memory())  # for all of its processes, also those that other drivers ask for
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # a process for news that cannot come
            cpus = max(
                os.cpu_count() or 1, at_once * _cpus(config, True, config.cluster.most_workers)
            )  # `compare` trains with and without in turn
            ray.init(address="local", num_cpus=cpus, include_dashboard=False, runtime_env=environment, **quiet)
    except AuthenticationError as error:
        raise no_entry(address or "this machine", error) from None
    except (OSError, RuntimeError, ValueError) as error:
        if "Version mismatch" in str(error):
            versions = re.sub(r":? *\n *", " ", str(error).strip())
            raise ResourceError(
                f"{address} runs other versions ({versions}): install the same here and there"
            ) from None
        if "Initialization failure" in str(error):
            raise ResourceError(
                f"{address} could not start the process that Ray Client needs there: try again, start its head with "
                "GRPC_ENABLE_FORK_SUPPORT=0, or send the command to the cluster by `ray-dwm submit`"
            ) from None
        if address and "Failed to connect" in str(error):  # though somebody listens there: `probe` did not object
            raise ResourceError(
                f"{address} answers, but does not let Ray in: where the cluster wants a token set RAY_AUTH_MODE=token "
                "and RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file with it; else name a cluster of Ray, or unset "
                "RAY_ADDRESS"
            ) from None
        raise unreachable(address or "this machine", str(error).splitlines()[0]) from None


def unreachable(address: str, reason: str) -> ResourceError:
    """The error of an address at which there is no cluster."""
    return ResourceError(
        f"no Ray cluster answers at {address} ({reason}): start one with `ray start --head`, or unset RAY_ADDRESS to "
        "use this machine"
    )


def no_entry(address: str, error: AuthenticationError) -> ResourceError:
    """The error of a cluster that was given no token, or a wrong one."""
    reason = error.message.strip().splitlines()[0]
    return ResourceError(
        f"the cluster at {address} wants its token ({reason}): set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN, or "
        "RAY_AUTH_TOKEN_PATH to a file with it"
    )


def probe(address: str) -> None:
    """Ray itself asks an address that nobody listens at for minutes; one connection tells at once.

    Raises:
        OSError: nobody listens there.
    """
    if address == "auto":  # the last cluster of this machine, which may be long gone
        address = canonicalize_bootstrap_address(address) or ""
    match = re.fullmatch(r"(?:ray://)?\[?([^/\[\]]+)\]?:(\d+)", address)
    if match:
        socket.create_connection((match[1], int(match[2])), timeout=_PROBE_TIMEOUT_S).close()


def quiet_ray_data() -> None:
    """Keep Ray Data's plans and progress bars out of this process's output; its log files have them."""
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False


def is_temporary(folder: str) -> bool:
    """Whether a folder would lie in a Ray job's working folder, which other nodes do not see."""
    return in_job() and not Path(folder).expanduser().is_absolute()


def warn_if_temporary(key: str, folder: str) -> None:
    """Say that a relative folder goes with a Ray job's working folder."""
    if folder and is_temporary(folder):
        say(
            f"warning: {key}={folder} is relative, and a Ray job's working folder is temporary: pass "
            f"{key}=/a/shared/folder to keep what is made and to be able to resume"
        )


def needed(config: RunConfig, workers: int) -> dict[str, float]:
    """Logical resources that a run of so many workers holds at the same time."""
    cluster, dwm = config.cluster, config.learns_dwm
    beside = config.evaluation.gpus if config.evaluation.every else 0.0
    gpus = workers * cluster.gpus_per_worker + actor_bundle(config)["GPU"] + beside
    return {"CPU": _cpus(config, dwm, workers), "GPU": gpus}


def _cpus(config: RunConfig, dwm: bool, workers: int) -> int:
    cluster = config.cluster
    beside = 0.0 if cluster.elastic else (actor_cpus(config) if dwm else 0) + DRIVER_HEADROOM_CPUS
    if config.evaluation.every:
        beside += config.evaluation.cpus
    return math.ceil(workers * cluster.cpus_per_worker + beside)


def actor_cpus(config: RunConfig) -> float:
    """Logical CPUs of the DWM actor.

    None beside an elastic group: Ray counts all CPUs of a node as the group's, and would ask for more than is free.
    """
    return 0.0 if config.cluster.elastic else config.cluster.dwm_cpus


def worker_bundle(config: RunConfig) -> dict[str, float]:
    """Logical resources of one worker."""
    return {"CPU": config.cluster.cpus_per_worker, "GPU": config.cluster.gpus_per_worker}


def actor_bundle(config: RunConfig) -> dict[str, float]:
    """Logical resources of the DWM actor; none where there is no actor."""
    if not config.learns_dwm:
        return {"CPU": 0.0, "GPU": 0.0}
    return {"CPU": actor_cpus(config), "GPU": config.cluster.dwm_gpus}


def worker_environment(config: RunConfig) -> dict[str, str]:
    """Environment variables of one worker, from its start: without a GPU of its own it must not take its node's."""
    return {} if config.cluster.gpus_per_worker else {"CUDA_VISIBLE_DEVICES": "", **_keep_memory()}


def _keep_memory() -> dict[str, str]:
    """Whoever has set one of them is heeded."""
    return {name: os.environ.get(name, value) for name, value in _KEEP_MEMORY.items()}


def alive_nodes() -> list[dict[str, Any]]:
    """Ray's records of the nodes."""
    return [node for node in ray.nodes() if node["Alive"]]


def by_client() -> bool:
    """Whether this process is outside of the cluster, with Ray Client (ray://) between them."""
    return bool(ray.util.client.ray.is_connected())


def free_resources() -> dict[str, dict[str, float]]:
    """ID of each node -> what nobody holds there at the moment; asked from within, where Ray Client cannot."""
    if not by_client():
        return dict(available_resources_per_node())
    free: dict[str, dict[str, float]] = ray.get(ray.remote(available_resources_per_node).options(num_cpus=0).remote())
    return free


def fitting(nodes: list[dict[str, float]], bundle: dict[str, float]) -> int:
    """How many of a bundle the nodes hold together; one never spans two nodes."""
    asked = {kind: amount for kind, amount in bundle.items() if amount > 0}
    return sum(int(min(node.get(kind, 0.0) / amount + 1e-9 for kind, amount in asked.items())) for node in nodes)


def less(node: Mapping[str, float], amounts: Mapping[str, float]) -> dict[str, float]:
    """What a node has when something has been taken there."""
    return {kind: max(0.0, amount - amounts.get(kind, 0.0)) for kind, amount in node.items()}


def room_for_workers(config: RunConfig, nodes: list[dict[str, float]]) -> int:
    """How many workers the nodes hold beside the DWM actor, where it leaves them most; none where it fits no node."""
    actor, bundle = actor_bundle(config), worker_bundle(config)
    if not any(actor.values()):
        return fitting(nodes, bundle)
    lost = [fitting([node], bundle) - fitting([less(node, actor)], bundle) for node in nodes if fitting([node], actor)]
    return fitting(nodes, bundle) - min(lost) if lost else 0


def beside_actor(config: RunConfig) -> str:
    """What is said of the room for workers where it is that beside an actor."""
    return " beside the DWM actor" if any(actor_bundle(config).values()) else ""


def preflight(config: RunConfig) -> int:
    """Compare what the run needs with what the cluster has; an elastic run needs its fewest workers.

    Returns:
        The workers that it has room for, at most those of the configuration.

    Raises:
        ResourceError: naming what is missing; Ray alone would wait forever.
    """
    cluster, available = config.cluster, ray.cluster_resources()
    for kind, amount in needed(config, cluster.least_workers).items():
        if available.get(kind, 0.0) < amount:
            raise ResourceError(
                f"the run needs {amount:g} {kind}s ({cluster.least_workers} workers, the DWM actor and reading), the "
                f"cluster has {available.get(kind, 0.0):g}: lower cluster.workers or "
                f"cluster.{kind.lower()}s_per_worker, or add nodes"
            )
    nodes = [node["Resources"] for node in alive_nodes()]
    _check_fits("the DWM actor", actor_bundle(config), nodes, "cluster.dwm_cpus or cluster.dwm_gpus")
    fit = room_for_workers(config, nodes)
    if fit < cluster.least_workers:
        raise ResourceError(
            f"only {fit} of {cluster.least_workers} workers of {cluster.cpus_per_worker:g} CPUs and "
            f"{cluster.gpus_per_worker:g} GPUs fit the cluster's nodes{beside_actor(config)}: lower cluster.workers or "
            "what a worker asks for"
        )
    if config.evaluation.tasks:  # also where it runs after training alone: a run would wait for it without end
        asked = {"CPU": config.evaluation.cpus, "GPU": config.evaluation.gpus}
        _check_fits("an evaluation", asked, nodes, "evaluation.cpus or evaluation.gpus")
    return min(fit, cluster.most_workers)


def _check_fits(what: str, asked: dict[str, float], nodes: list[dict[str, float]], keys: str) -> None:
    if any(asked.values()) and not fitting(nodes, asked):
        raise ResourceError(
            f"{what} of {asked['CPU']:g} CPUs and {asked['GPU']:g} GPUs fits no node of the cluster: lower {keys}"
        )
