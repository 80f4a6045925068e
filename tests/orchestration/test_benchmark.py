"""The benchmark of ingest runs on a cluster, and its figures hang together."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from orchestration.conftest import PATIENCE_S, ROOT

TINY = ["--preset", "tiny", "--vocab", "64", "--seq-len", "16", "--global-batch", "8", "--micro-batch", "4"]
FEW = ["--steps", "2", "--rounds", "1", "--batches", "20", "--stall-steps", "2", "--read-seq-len", "64"]
FEW += ["--workers", "1", "--gigabytes", "0.001"]


@pytest.mark.slow
def test_ingest_writes_figures(tmp_path: Path, cluster: dict[str, str]) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "ingest.py"), *TINY, *FEW, "--output", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE_S, env=cluster)
    content = json.loads((tmp_path / "ingest-cpu-tiny.json").read_text())
    result = content["result"]
    assert "ray" in content["versions"]
    for world in (1, 2):
        speed = result[f"workers {world}"]
        assert speed["ray_over_map"]["max"] > 0
        assert speed["first_batch_s"]["min"] > 0
    assert 0 <= result["stall"]["ray_waiting_fraction"] < 1
    assert result["held"].keys() == {"0.001 GB"}
    assert result["held"]["0.001 GB"]["spilled_mb"] == 0 < result["held"]["0.001 GB"]["worker_own_mb"]
