"""Waiting for a place: what is asked for and what there is, the deadline, and a storage that a node does not see."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import ray
from synthetic import tiny_config

from ray_dwm import logs
from ray_dwm.errors import ResourceError
from ray_dwm.orchestration import cluster, placement
from ray_dwm.orchestration.cluster import SLIVER_CPUS
from ray_dwm.orchestration.findings import Finding


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Time that passes by sleeping alone."""
    now = [0.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(placement, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=sleep))
    return now


def hold(monkeypatch: pytest.MonkeyPatch, cpus: Iterator[float], free: Iterator[float]) -> None:
    """A node that has so many CPUs, and so many free, at each look; the last number stays."""
    has, left = [0.0], [0.0]

    def look(numbers: Iterator[float], last: list[float]) -> float:
        last[0] = next(numbers, last[0])
        return last[0]

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": look(cpus, has)})
    monkeypatch.setattr(cluster, "alive_nodes", lambda: [{"Resources": {"CPU": has[0]}}])
    monkeypatch.setattr(placement, "free_resources", lambda: {"node": {"CPU": look(free, left)}})


NEEDS_4 = ("train.micro_batch=1", "cluster.workers=2")


@pytest.mark.parametrize(
    ("options", "cpus", "free", "seconds", "message"),
    [
        ((), [2], [2], 0, "^the run needs 4 CPUs .* the cluster has 2"),
        (("cluster.nodes_within_s=30",), [2], [2], 30, "^after 30 s, the run needs 4 CPUs .* the cluster has 2"),
        (("cluster.nodes_within_s=30",), [2] * 9 + [4], [4], 9, None),
        ((), [4], [1] * 70 + [4], 70, None),
        (
            ("cluster.free_within_s=100",),
            [4],
            [3],
            100,
            "^after 100 s, the run needs 4 CPUs, of which 3 CPUs are free now, with room for 2 of 2 workers beside "
            "the DWM actor: others ",
        ),
    ],
)
def test_a_run_waits_to_its_deadline(
    shards: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    clock: list[float],
    options: tuple[str, ...],
    cpus: list[float],
    free: list[float],
    seconds: float,
    message: str | None,
) -> None:
    hold(monkeypatch, iter(cpus), iter(free))
    config = tiny_config(shards, tmp_path, *NEEDS_4, *options)
    if message is None:
        assert placement.await_resources(config) == 2
    else:
        with pytest.raises(ResourceError, match=message):
            placement.await_resources(config)
    assert clock[0] == seconds
    told = capsys.readouterr().out.splitlines()
    assert len(told) == -(-max(0.0, seconds - 5) // 60)  # from 5 s on, once a minute
    assert all("waiting for up to" in line and "the run needs 4 CPUs" in line for line in told)


def test_waiting_is_an_event_for_collectors(
    shards: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    clock: list[float],
) -> None:
    hold(monkeypatch, iter([4.0]), iter([1.0] * 7 + [4.0]))
    monkeypatch.setattr(logs._HANDLER, "formatter", logs.JsonLines())
    placement.await_resources(tiny_config(shards, tmp_path, *NEEDS_4))
    [event] = map(json.loads, capsys.readouterr().out.splitlines())
    assert event["run"] == "run" and event["message"].startswith("waiting for up to 3600 s: the run needs 4 CPUs")


def test_a_run_that_fits_in_sum_but_on_no_node_waits(
    shards: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placement, "free_resources", lambda: {"a": {"CPU": 2.0}, "b": {"CPU": 2.0}, "c": {"CPU": 1.0}})
    placement.check_room(tiny_config(shards, tmp_path, *NEEDS_4))
    config = tiny_config(shards, tmp_path, "train.micro_batch=1", "cluster.workers=1", "cluster.cpus_per_worker=2.5")
    with pytest.raises(ResourceError, match="room for 0 of 1 workers beside the DWM actor: others"):
        placement.check_room(config)
    large = tiny_config(shards, tmp_path, "cluster.workers=1", "cluster.dwm_cpus=3")
    with pytest.raises(ResourceError, match="needs 5 CPUs, of which 5 CPUs are free now, with room for 0 of 1 workers"):
        placement.check_room(large)


def test_a_trials_driver_does_not_wait_for_itself(
    shards: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, free = tiny_config(shards, tmp_path, *NEEDS_4), {"CPU": 4.0 - SLIVER_CPUS}
    monkeypatch.setattr(placement, "free_resources", lambda: {"a": free})
    placement.check_room(config)
    free["CPU"] -= SLIVER_CPUS
    with pytest.raises(ResourceError, match="the run needs 4 CPUs"):
        placement.check_room(config)


@pytest.mark.parametrize(("nodes", "client"), [(1, False), (3, False), (1, True)])
def test_a_storage_that_a_node_does_not_see_is_refused(
    shards: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nodes: int, client: bool
) -> None:
    config = tiny_config(shards, tmp_path / "runs")
    asked = []

    def check(storage: Path, inputs: list[Path], limit_s: float) -> list[Finding]:
        asked.append((storage, {path.parent for path in inputs}))
        return [Finding("storage", "failed", "node-2 does not see it", "mount it")] * 2

    monkeypatch.setattr(placement, "alive_nodes", lambda: [{}] * nodes)
    monkeypatch.setattr(placement, "by_client", lambda: client)
    monkeypatch.setattr(placement, "check_storage", check)
    if nodes == 1 and not client:
        placement.prove_storage(config)
        assert not asked
        return
    with pytest.raises(ResourceError, match=r"^node-2 does not see it \(and 1 more\): mount it$"):
        placement.prove_storage(config)
    assert asked == [(tmp_path / "runs", set(shards.values()))]
