"""What is asked of Ray before anything runs on it: each shortage one line and exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
from ray.exceptions import AuthenticationError
from synthetic import tiny_config

from ray_dwm.config import load
from ray_dwm.errors import ResourceError
from ray_dwm.orchestration import cluster
from ray_dwm.orchestration.cluster import (
    _cpus,
    fitting,
    needed,
    preflight,
    room_for_workers,
    warn_if_temporary,
)
from ray_dwm.orchestration.train import train


def test_too_small_a_cluster(
    shards: dict[str, Path], driver: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(shards, tmp_path / "runs", "train.micro_batch=1", "cluster.workers=8")
    with pytest.raises(ResourceError, match=r"^the run needs 10 CPUs .* the cluster has 8: ") as raised:
        train(config)
    assert raised.value.exit_code == 2 and "\n" not in str(raised.value)
    assert capsys.readouterr().out == "" and not (tmp_path / "runs").exists()


def test_unreachable_cluster(shards: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(shards, tmp_path / "runs")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    with pytest.raises(
        ResourceError, match=r"^no Ray cluster answers at 127\.0\.0\.1:9 .*`ray start --head`"
    ) as raised:
        train(config)
    assert raised.value.exit_code == 2 and "\n" not in str(raised.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.1\n    Python: 3.9\n"),
            r"somewhere runs other versions \(.*Ray: 2.1 Python: 3.9\): install",
        ),
        (
            ConnectionError("Failed to connect to Ray cluster at 10.0.0.1:6379"),
            "somewhere answers, but does not let Ray in: where the cluster wants a token set RAY_AUTH_MODE=token",
        ),
        (
            ConnectionAbortedError("Initialization failure from server:\nTraceback"),
            "somewhere could not start the process that Ray Client needs there: try again",
        ),
        (
            AuthenticationError("Token authentication is enabled but no token was found\nmore"),
            r"somewhere wants its token \(Token .* found\): set RAY_AUTH_MODE=token",
        ),
    ],
)
def test_a_cluster_that_takes_nobody(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def refuse(**arguments: object) -> None:
        raise error

    monkeypatch.setenv("RAY_ADDRESS", "somewhere")
    monkeypatch.setattr(cluster.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(cluster.ray, "init", refuse)
    with pytest.raises(ResourceError, match=message):
        cluster.connect(load([], []))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cluster.cpus_per_worker=9"], "the run needs 11 CPUs"),
        (["cluster.gpus_per_worker=1"], "the run needs 1 GPUs"),
        (["cluster.dwm_gpus=0.5"], "the run needs 0.5 GPUs"),
        (["evaluation.tasks=t.jsonl", "evaluation.gpus=1"], "an evaluation of 0 CPUs and 1 GPUs fits no node"),
        (["evaluation.tasks=t.jsonl", "evaluation.cpus=6"], "an evaluation of 6 CPUs and 0 GPUs fits no node"),
        (["cluster.dwm_cpus=8"], "the DWM actor of 8 CPUs and 0 GPUs fits no node of the cluster: lower cluster.dwm_"),
        (["cluster.cpus_per_worker=6"], "only 0 of 1 workers of 6 CPUs and 0 GPUs fit"),
        (
            ["cluster.workers=2", "cluster.cpus_per_worker=3", "cluster.dwm_cpus=3"],
            "only 1 of 2 workers of 3 CPUs and 0 GPUs fit the cluster's nodes beside the DWM actor: lower",
        ),
        (
            ["cluster.cpus_per_worker=6", "weighting.method=uniform"],
            "only 0 of 1 workers of 6 CPUs and 0 GPUs fit the cluster's nodes: lower",
        ),
    ],
)
def test_each_shortage_is_named(
    shards: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], message: str
) -> None:
    """On two nodes of 5 CPUs."""
    monkeypatch.setattr(cluster, "alive_nodes", lambda: [{"Resources": {"CPU": 5.0}}] * 2)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 10.0})
    config = tiny_config(shards, tmp_path, "train.micro_batch=1", *overrides)
    with pytest.raises(ResourceError, match=f"^{message}"):
        preflight(config)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["cluster.workers=2"], {"CPU": 4, "GPU": 0}),
        (["cluster.workers=2", "weighting.method=uniform"], {"CPU": 3, "GPU": 0}),
        (["cluster.workers=2", "weighting.method=loss"], {"CPU": 3, "GPU": 0}),
        (["cluster.workers=4", "cluster.gpus_per_worker=1", "cluster.dwm_gpus=0.25"], {"CPU": 6, "GPU": 4.25}),
        (["cluster.workers=[1,3]", "cluster.cpus_per_worker=2"], {"CPU": 6, "GPU": 0}),
        (["cluster.workers=1", "cluster.cpus_per_worker=2.5", "cluster.dwm_cpus=0.5"], {"CPU": 4, "GPU": 0}),
    ],
)
def test_needed(shards: dict[str, Path], tmp_path: Path, overrides: list[str], expected: dict[str, float]) -> None:
    config = tiny_config(shards, tmp_path, "train.micro_batch=1", *overrides)
    assert needed(config, config.cluster.most_workers) == expected


def test_a_private_cluster_has_room_for_both_runs_of_a_comparison(shards: dict[str, Path], tmp_path: Path) -> None:
    uniform = tiny_config(shards, tmp_path, "cluster.workers=2", "weighting.method=uniform")
    assert _cpus(uniform, True, 2) == needed(tiny_config(shards, tmp_path, "cluster.workers=2"), 2)["CPU"]


@pytest.mark.parametrize(
    ("bundle", "expected"), [({"CPU": 2, "GPU": 0}, 3), ({"CPU": 5, "GPU": 0}, 0), ({"CPU": 1, "GPU": 1}, 2)]
)
def test_a_worker_never_spans_two_nodes(bundle: dict[str, float], expected: int) -> None:
    nodes = [{"CPU": 4.0, "GPU": 2.0}, {"CPU": 3.0}]
    assert fitting(nodes, bundle) == expected


@pytest.mark.parametrize(
    ("overrides", "nodes", "expected"),
    [
        ([], [{"CPU": 2.0}] * 2, 3),
        (["weighting.method=uniform"], [{"CPU": 2.0}] * 2, 4),
        (["cluster.dwm_cpus=8"], [{"CPU": 4.0}] * 4, 0),
        (["cluster.dwm_cpus=3"], [{"CPU": 2.0}, {"CPU": 4.0}], 3),
        (["cluster.cpus_per_worker=2"], [{"CPU": 4.0}, {"CPU": 3.0}], 3),  # where it costs no worker its place
        (["cluster.gpus_per_worker=1", "cluster.dwm_gpus=0.5"], [{"CPU": 9.0, "GPU": 4.0}, {"CPU": 9.0}], 3),
        (["cluster.dwm_gpus=0.5"], [{"CPU": 1.0, "GPU": 1.0}, {"CPU": 4.0}], 4),
        (["cluster.workers=[1,3]"], [{"CPU": 2.0}] * 2, 4),
    ],
)
def test_the_actor_has_a_node_first(
    shards: dict[str, Path], tmp_path: Path, overrides: list[str], nodes: list[dict[str, float]], expected: int
) -> None:
    config = tiny_config(shards, tmp_path, "train.micro_batch=1", "cluster.workers=1", *overrides)
    assert room_for_workers(config, nodes) == expected


@pytest.mark.parametrize(
    ("folder", "in_job", "told"),
    [
        ("runs", True, True),
        ("/runs", True, False),
        ("~/runs", True, False),
        ("", True, False),
        ("runs", False, False),
    ],
)
def test_a_relative_folder_of_a_job_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: str, in_job: bool, told: bool
) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    if in_job:
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    warn_if_temporary("storage", folder)
    assert ("warning: storage=runs is relative" in capsys.readouterr().out) is told
