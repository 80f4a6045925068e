"""What is asked of Ray before anything runs on it: each shortage one line and exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest
from orchestration.conftest import Console
from synthetic import tiny_config

from ray_dwm.orchestration.cluster import needed


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["cluster.workers=8"], "the run needs 10 CPUs"),
        (["cluster.cpus_per_worker=9"], "the run needs 11 CPUs"),
        (["cluster.gpus_per_worker=1"], "the run needs 1 GPUs"),
        (["cluster.dwm_gpus=0.5"], "the run needs 0.5 GPUs"),
    ],
)
def test_too_small_a_cluster(
    shards: dict[str, Path], console: Console, tmp_path: Path, overrides: list[str], message: str
) -> None:
    config = tiny_config(shards, tmp_path / "runs", "train.micro_batch=1", *overrides)
    output = console.finish(config, console.start(config), code=2)
    assert output.count("\n") == 1
    assert output.startswith(f"error: {message}")
    assert "the cluster has" in output
    assert not (tmp_path / "runs").exists()


def test_unreachable_cluster(shards: dict[str, Path], console: Console, tmp_path: Path) -> None:
    config = tiny_config(shards, tmp_path / "runs")
    console.environment = {**console.environment, "RAY_ADDRESS": "127.0.0.1:9"}
    output = console.finish(config, console.start(config), code=2)
    assert output.splitlines()[-1].startswith("error: no Ray cluster answers at 127.0.0.1:9")
    assert "`ray start --head`" in output
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["cluster.workers=2"], {"CPU": 4, "GPU": 0}),
        (["cluster.workers=2", "dwm.enabled=false"], {"CPU": 3, "GPU": 0}),
        (["cluster.workers=4", "cluster.gpus_per_worker=1", "cluster.dwm_gpus=0.25"], {"CPU": 6, "GPU": 4.25}),
        (["cluster.workers=1", "cluster.cpus_per_worker=2.5", "cluster.dwm_cpus=0.5"], {"CPU": 4, "GPU": 0}),
    ],
)
def test_needed(shards: dict[str, Path], tmp_path: Path, overrides: list[str], expected: dict[str, float]) -> None:
    assert needed(tiny_config(shards, tmp_path, "train.micro_batch=1", *overrides)) == expected
