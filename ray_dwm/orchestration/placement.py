"""A place for a run: waiting for what it needs, to a deadline, and the proof that all nodes see its storage."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from ray_dwm.config import RunConfig
from ray_dwm.data.manifest import MANIFEST
from ray_dwm.errors import ResourceError
from ray_dwm.logs import say
from ray_dwm.orchestration.cluster import (
    SLIVER_CPUS,
    alive_nodes,
    beside_actor,
    by_client,
    free_resources,
    needed,
    preflight,
    room_for_workers,
)
from ray_dwm.orchestration.doctor_probes import check_storage

_POLL_S = 1.0
_QUIET_S = 5.0
"""Not worth a word: Ray hears late of what has been given back."""
_TELL_S = 60.0
_STORAGE_S = 120.0
"""In which each node must start a process and read a file; cold nodes import torch from slow disks."""


def await_resources(config: RunConfig) -> int:
    """Wait until the run has room, as long as the configuration allows.

    Returns:
        The workers that the cluster has room for, as `preflight`.

    Raises:
        ResourceError: what is asked for and what there is, at the deadline.
    """
    cluster = config.cluster
    _wait(config, lambda: preflight(config), cluster.nodes_within_s)
    _wait(config, lambda: check_room(config), cluster.free_within_s)
    return preflight(config)


def _wait(config: RunConfig, check: Callable[[], object], limit_s: float) -> None:
    start, told = time.monotonic(), -_TELL_S
    while True:
        try:
            check()
            return
        except ResourceError as error:
            waited = time.monotonic() - start
            if limit_s == 0:
                raise
            if waited >= limit_s:
                raise ResourceError(f"after {waited:.0f} s, {error}") from None
            if waited >= _QUIET_S and waited - told >= _TELL_S:
                told = waited
                say(f"waiting for up to {limit_s:g} s: {error}", run=config.name)
        time.sleep(_POLL_S)


def check_room(config: RunConfig) -> None:
    """Compare what the fewest workers need with what nobody holds.

    Raises:
        ResourceError: naming both.
    """
    least, free = config.cluster.least_workers, list(free_resources().values())
    asked = {kind: amount for kind, amount in needed(config, least).items() if amount > 0}
    there = {kind: sum(node.get(kind, 0.0) for node in free) for kind in asked}
    fit = room_for_workers(config, free)
    # A trial's driver would wait for what it holds itself; reading, for which a CPU is asked, has room for that.
    own = {"CPU": SLIVER_CPUS}
    if fit >= least and all(there[kind] + own.get(kind, 0.0) > amount - 1e-9 for kind, amount in asked.items()):
        return
    wanted = ", ".join(f"{amount:g} {kind}s" for kind, amount in asked.items())
    found = ", ".join(f"{amount:g} {kind}s" for kind, amount in there.items())
    raise ResourceError(
        f"the run needs {wanted}, of which {found} are free now, with room for {min(fit, least)} of {least} workers"
        f"{beside_actor(config)}: others hold the rest; wait for them, stop them, or raise cluster.free_within_s"
    )


def prove_storage(config: RunConfig) -> None:
    """Let every node read and write where the run goes, and compare the manifests; a machine alone needs no proof.

    Args:
        config: with absolute paths, of sets that are there.

    Raises:
        ResourceError: naming a node that does not see the storage or the data.
    """
    if len(alive_nodes()) == 1 and not by_client():
        return
    inputs = [Path(folder) / MANIFEST for folder in (config.data.train, *config.data.evaluation_sets.values())]
    rows = check_storage(config.run_dir.parent, inputs, _STORAGE_S)
    failed = [row for row in rows if row.state == "failed"]
    if failed:
        more = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
        raise ResourceError(f"{failed[0].found}{more}: {failed[0].remedy}")
