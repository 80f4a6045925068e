"""How many trials a cluster holds at once, so that none of them waits for what another one holds half of.

A trial is a driver, a DWM actor and a group of workers. Ray places a group whole or not at all, so a trial that lacks
room holds its driver and its actor alone; it would wait for ever only where these took the place of everyone's groups.
So as many trials are allowed as have room for all their groups wherever drivers and actors come to lie.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from ray_dwm.config import RunConfig
from ray_dwm.orchestration.cluster import SLIVER_CPUS, actor_bundle, fitting, less, needed, worker_bundle

DRIVER = "train_driver"
"""A resource of nodes that are meant for drivers, as Kubernetes gives to the head: one for each trial at once."""


def driver_resources(cluster: Mapping[str, float]) -> dict[str, float]:
    """What a trial's driver asks for: a place where drivers belong, or else a sliver of any CPU."""
    return {DRIVER: 1.0} if cluster.get(DRIVER, 0.0) else {"CPU": SLIVER_CPUS}


def at_once(nodes: Sequence[Mapping[str, float]], run: RunConfig) -> int:
    """Trials of a run that have room at the same time; at least 1, because one is checked before.

    Args:
        nodes: the resources of each.
    """
    total = {kind: sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU", DRIVER)}
    asked = needed(run, run.cluster.most_workers)
    if total[DRIVER]:
        asked[DRIVER] = 1.0
    bounds = [int(total[kind] / amount + 1e-9) for kind, amount in asked.items() if amount > 0]
    most = max(1, min(bounds))
    while most > 1 and not _have_room(nodes, run, most, bool(total[DRIVER])):
        most -= 1
    return most


def _have_room(nodes: Sequence[Mapping[str, float]], run: RunConfig, trials: int, apart: bool) -> bool:
    """Whether all groups of so many trials fit beside their drivers and actors, wherever these lie.

    Args:
        apart: drivers lie where they take nothing from the groups.
    """
    bundle, actor = worker_bundle(run), actor_bundle(run)
    driver = 0.0 if apart else SLIVER_CPUS
    beside = {"CPU": trials * (actor["CPU"] + driver), "GPU": trials * actor["GPU"]}
    places = fitting([dict(node) for node in nodes], bundle)
    # At worst all of that lies on whichever node it costs most; and no part costs more places than it is large.
    if_anywhere = places - fitting([less(node, beside) for node in nodes], bundle)
    of_actor = max(math.ceil(actor[kind] / amount) for kind, amount in bundle.items() if amount > 0)
    lost = min(if_anywhere, trials * (of_actor + (0 if apart else 1)))
    return trials * run.cluster.most_workers <= places - lost
