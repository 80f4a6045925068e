"""The scripts behind figures about speed run, on the CPU and without Ray, and write what they promise."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
TINY = ["--preset", "tiny", "--vocab", "64", "--seq-len", "16", "--global-batch", "8", "--micro-batch", "4"]


@pytest.mark.parametrize(
    ("script", "options", "key"),
    [
        ("loop_overhead", ["--steps", "2", "--rounds", "1"], "ours_over_bare"),
        ("bilevel_overhead", ["--steps", "4", "--every", "2", "--rounds", "1", "--target-batch", "8"], "overhead"),
    ],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])  # bf16 is the CPU's twin of benchmarks/gpu.sh
def test_scripts_write_figures_with_configuration_and_versions(
    tmp_path: Path, script: str, options: list[str], key: str, precision: str
) -> None:
    command = [sys.executable, str(FOLDER / f"{script}.py"), *TINY, *options, "--precision", precision]
    subprocess.run([*command, "--output", str(tmp_path)], check=True, capture_output=True, timeout=120)
    (file,) = tmp_path.iterdir()
    content = json.loads(file.read_text())
    assert content["result"][key]["min"] <= content["result"][key]["median"] <= content["result"][key]["max"]
    assert content["versions"].keys() >= {"torch", "transformers"}
    assert content["config"]["train"]["precision"] == precision


def test_gpu_script_is_sound_shell() -> None:
    subprocess.run(["bash", "-n", str(FOLDER / "gpu.sh")], check=True)
