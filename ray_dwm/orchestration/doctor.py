"""`ray-dwm doctor`: everything that would make a run fail, looked at before it costs anything."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable

import ray

from ray_dwm.config import RunConfig
from ray_dwm.data.manifest import find_manifest
from ray_dwm.engine.checks import seq_len
from ray_dwm.models.presets import lm_shape
from ray_dwm.orchestration import doctor_config, doctor_nodes, doctor_probes
from ray_dwm.orchestration.cluster import (
    NAMESPACE,
    alive_nodes,
    connect,
    fitting,
    free_resources,
    is_temporary,
    preflight,
    probe,
    unreachable,
    worker_bundle,
)
from ray_dwm.orchestration.doctor_nodes import NodeFacts
from ray_dwm.orchestration.dwm_actor import actor_name
from ray_dwm.orchestration.findings import Finding, attempt, count, has_failed, run_check
from ray_dwm.orchestration.run import absolute

_LIMIT_S = 120.0
"""Of a check that waits for processes of Ray; their own waits are shorter, so that they can say more."""
_WAIT_S = 90.0
_ANSWER_S = 45.0
_MOST_PER_CORE = 8
"""Processes that a core can start within _WAIT_S: each imports torch."""


class Doctor:
    """The checks in order. A check whose ground another one found missing is skipped, with the reason."""

    def __init__(self, config: RunConfig | None, progress: Callable[[str], None] = lambda name: None) -> None:
        self._config = config
        self._run = absolute(config) if config else doctor_config.stand_in([])
        self._progress = progress
        self._nodes: list[NodeFacts] = []
        self._free: dict[str, dict[str, float]] = {}
        self._workers = 0
        self._findings: list[Finding] = []

    def examine(self) -> list[Finding]:
        """All rows; stops Ray where it was started here."""
        self._check("versions", self._versions)
        self._check_configuration()
        if self._joins_cluster():
            self._check("nodes", self._ask_nodes)
            if self._nodes:
                self._run = self._run if self._config else doctor_config.stand_in(self._nodes)
                self._check_nodes()
                self._check_cluster()
            run_check("shutdown", _shutdown, _ANSWER_S)
        else:
            for name in ("nodes", "GPUs", "resources", "storage", "attention", "process group"):
                self._skip(name, "there is no cluster to look at")
        return self._findings

    def _check(self, name: str, check: Callable[[], Iterable[Finding]], limit_s: float = _LIMIT_S) -> bool:
        self._progress(name)
        rows = run_check(name, check, limit_s)
        self._findings.extend(rows)
        return not has_failed(rows)

    def _skip(self, name: str, reason: str) -> None:
        self._findings.append(Finding(name, "skipped", reason))

    def _versions(self) -> list[Finding]:
        python, wanted = doctor_nodes.requirements()
        return [doctor_nodes.check_versions(python, wanted, platform.python_version(), self._packages())]

    def _packages(self) -> dict[str, str]:
        names = [package.name for package in doctor_nodes.requirements()[1]]
        return {name: version for name in names if (version := doctor_nodes.installed_version(name))}

    def _check_configuration(self) -> None:
        run = self._run
        if self._config is None:
            for name in ("data", "checksums", "run folder", "disk"):
                self._skip(name, "no configuration was given")
            return
        sound = self._check("data", lambda: doctor_config.check_sets(run))
        made = doctor_config.data_are_there(run)
        there, reason = sound and made, "the data are not sound" if made else "there are no data yet"
        if there:
            self._check("checksums", lambda: [doctor_config.check_shards(run)], 5 * _LIMIT_S)
        else:
            self._skip("checksums", reason)
        temporary = is_temporary(self._config.storage)
        if not self._check("run folder", lambda: [doctor_config.check_run_folder(run, temporary)]):
            self._skip("disk", "there can be no run folder")
        elif there:
            self._check("disk", lambda: [doctor_config.measure_disk(run)])
        else:
            self._skip("disk", f"{reason}, and the size of an LM depends on their vocabulary")
        if run.mirror:
            self._check("mirror", lambda: [doctor_config.check_mirror(run)])

    def _joins_cluster(self) -> bool:
        if not self._check("Ray", lambda: _probe_cluster(os.environ.get("RAY_ADDRESS"))):
            return False
        # Not in a thread: the cluster that is started here would end with it.
        rows = attempt("Ray", self._connect)
        self._findings.extend(rows)
        return not has_failed(rows)

    def _connect(self) -> list[Finding]:
        connect(self._run)
        own = "" if os.environ.get("RAY_ADDRESS") else ", started for this: RAY_ADDRESS names no other"
        return [Finding("Ray", "ok", f"cluster of {count(len(alive_nodes()), 'node')}{own}")]

    def _ask_nodes(self) -> list[Finding]:
        self._nodes, rows = doctor_probes.ask_nodes(list(self._packages()), _ANSWER_S)
        same = doctor_nodes.check_same_versions(platform.python_version(), self._packages(), self._nodes)
        return [*rows, same] if self._nodes else rows

    def _check_nodes(self) -> None:
        nodes, here = self._nodes, doctor_nodes.traps(os.environ, ray.util.get_node_ip_address())
        self._check("GPUs", lambda: [doctor_nodes.check_gpus(nodes, self._config)])
        self._check("limits", lambda: doctor_nodes.check_limits(nodes))
        self._check("environment", lambda: doctor_nodes.check_traps(here, nodes))
        self._check("clocks", lambda: [doctor_nodes.check_clocks(nodes)])
        if self._config is not None:
            self._check("W&B", lambda: [doctor_nodes.check_wandb(self._run, nodes)])

    def _check_cluster(self) -> None:
        run = self._run
        fits = self._check("resources", self._resources)
        if run.learns_dwm:
            self._check("run name", lambda: [_check_name(run)])
        if self._config is None:
            self._skip("object store", "no configuration was given")
            self._skip("storage", "no configuration was given")
        else:
            self._check("object store", self._object_store)
            storage, inputs = run.run_dir.parent, doctor_config.input_files(run)
            self._check("storage", lambda: doctor_probes.check_storage(storage, inputs, _ANSWER_S))
        self._check("attention", self._attention)
        if reason := self._no_group(fits):
            self._skip("process group", reason)
        else:
            self._check("process group", lambda: doctor_probes.check_group(run, self._workers, _WAIT_S))

    def _no_group(self, fits: bool) -> str:
        """Why there can be no process group now; waiting for it would tell nothing more."""
        if not fits:
            return "the cluster cannot hold the run's workers"
        if fitting(list(self._free.values()), worker_bundle(self._run)) < self._workers:
            return "others hold what the workers need: run doctor again when they have ended"
        cores = sum(node.cores for node in self._nodes)
        if self._workers > _MOST_PER_CORE * cores:
            return f"{self._workers} workers on {count(cores, 'core')} start too slowly to be tried"
        return ""

    def _resources(self) -> list[Finding]:
        run, cores = self._run, sum(node.cores for node in self._nodes)
        # Before the probes, and once: Ray hears late of what they have given back.
        self._free = free_resources()
        self._workers = preflight(run)
        free = list(self._free.values())
        return [doctor_config.check_free(run, self._workers, ray.cluster_resources(), free, cores)]

    def _object_store(self) -> list[Finding]:
        run, train = self._run, find_manifest(self._run.data.train)
        size = doctor_config.dwm_bytes(run, train) if train else 0
        return doctor_config.check_object_store(run, self._nodes, size)

    def _attention(self) -> list[Finding]:
        run, shape = self._run, lm_shape(self._run.lm.preset)
        train = find_manifest(run.data.train)
        tokens = seq_len(run, train) if train else run.lm.seq_len or run.prepare.seq_len
        head_dim = shape.width // shape.heads
        return doctor_probes.check_attention(run, head_dim, tokens, self._free, _WAIT_S)


def _check_name(config: RunConfig) -> Finding:
    """The DWM actor is known by the run's folder."""
    try:
        ray.get_actor(actor_name(config), namespace=NAMESPACE)
    except ValueError:
        return Finding("run name", "ok", f"no other job trains {config.name}")
    found = f"the cluster has an actor {actor_name(config)} already, another job trains this run"
    return Finding("run name", "failed", found, "wait for it, or choose another name=...")


def _shutdown() -> list[Finding]:
    ray.shutdown()
    return []


def _probe_cluster(address: str | None) -> list[Finding]:
    """Ask from a process that can be ended: Ray's own call waits for minutes, or for ever where something else listens.

    Raises:
        ResourceError: no cluster of Ray answers.
    """
    if not address or address == "local" or address.startswith("ray://"):
        return []
    try:
        probe(address)
    except OSError as error:
        raise unreachable(address, str(error)) from None
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--skip-version-check"]
    try:
        done = subprocess.run([*command, "--address", address], capture_output=True, text=True, timeout=_ANSWER_S)
    except subprocess.TimeoutExpired:
        raise unreachable(address, f"silent for {_ANSWER_S:g} s") from None
    if done.returncode == 0:
        return []
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    raise unreachable(address, lines[-1] if lines else "its health check failed")
