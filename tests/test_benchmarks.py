"""The scripts behind figures about speed run, on the CPU and without Ray, and write what they promise."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gloo import run

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
TINY = ["--preset", "tiny", "--vocab", "64", "--seq-len", "16", "--global-batch", "8", "--micro-batch", "4"]


def call(monkeypatch: pytest.MonkeyPatch, script: str, output: Path, *options: str) -> None:
    """Run a script in this process, which has imported what it needs."""
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *TINY, *options, "--output", str(output)])
    importlib.import_module(script).main()


@pytest.mark.slow
def test_loop_overhead_writes_figures_with_configuration_and_versions(tmp_path: Path) -> None:
    """From a shell; in bf16, as the CPU's twin of benchmarks/gpu.sh."""
    options = ["--steps", "2", "--rounds", "1", "--precision", "bf16", "--output", str(tmp_path)]
    subprocess.run([sys.executable, str(FOLDER / "loop_overhead.py"), *TINY, *options], check=True, timeout=800)
    (file,) = tmp_path.iterdir()
    content = json.loads(file.read_text())
    figures = content["result"]["ours_over_bare"]
    assert figures["min"] <= figures["median"] <= figures["max"]
    assert content["versions"].keys() >= {"torch", "transformers"}
    assert content["config"]["train"]["precision"] == "bf16"


@pytest.mark.slow
def test_memory_model_compares_every_case_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An LM this small is nothing beside what its process holds: figures are checked for being there."""
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")  # as the script does; monkeypatch takes it back
    call(monkeypatch, "memory_model", tmp_path, "--cases", "copies", "audited", "--target-batch", "2")
    content = json.loads((tmp_path / "memory_model-cpu-tiny.json").read_text())
    assert content["result"].keys() == {"audited, 1", "copies, 2", "audited, 2"}
    for row in content["result"].values():
        assert min(row["plain_predicted"], row["plain_measured"]) > 0
        assert row["bilevel_predicted"] > row["plain_predicted"]


@pytest.mark.slow
def test_bilevel_adds_its_tables_to_a_file_and_draws_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "bilevel-cpu-tiny.json"
    earlier = {"made_with": {}, "figures": {"cases": {}}}
    file.write_text(json.dumps({"result": {"peers": earlier}}))
    few = ["--settings", "default", "jvp", "--rounds", "1", "--runs", "1", "--points", "3", "--target-pool", "16"]
    options = ["--target-batch", "8", "--precision", "bf16", "--tables", "cost", "memory", "fidelity", "growth"]
    call(monkeypatch, "bilevel", tmp_path, *few, *options)
    assert (tmp_path / "bilevel-cpu-tiny.png").stat().st_size > 10_000
    content = json.loads(file.read_text())
    assert content["config"]["train"]["precision"] == "bf16"
    tables = content["result"]
    assert tables.pop("peers") == earlier
    assert tables.keys() == {"cost", "memory", "fidelity", "growth"}
    for table in tables.values():
        assert table["made_with"].keys() == {"seconds", "device", "versions", "options"}
    _check_figures({name: table["figures"] for name, table in tables.items()})


def _check_figures(figures: dict[str, Any]) -> None:
    cost = figures["cost"]["tiny"]
    computed = cost["settings"]["default"]["overhead_computed"]
    assert list(computed) == ["1", "5", "10", "20"]
    assert computed["1"] > computed["20"]
    assert cost["direct"]["default"]["overhead"].keys() == {"median", "min", "max"}
    assert figures["memory"]["tiny"]["default"]["ratio"] > 1
    assert figures["fidelity"]["settings"]["fp32"]["jvp"]["phi"]["median"] > 1 - 1e-6
    assert figures["fidelity"]["epsilon"]["bf16"].keys() >= {"richardson", "central 0.1", "one_sided 0.3"}
    assert figures["growth"].keys() == {"global batch", "sequence length", "LM parameters", "DWM parameters"}
    assert figures["growth"]["sequence length"]["exponent"].keys() >= {"plain", "bilevel"}


def peers() -> dict[str, torch.Tensor]:
    """dL_target/dw of one step, from every contender that is installed."""
    module = importlib.import_module("differentiable_peers")
    problem = module.Problem(preset="tiny", vocab=64, seq_len=16, batch=8, target_batch=4)
    contenders = {name: make for name, make in module.CONTENDERS.items() if module.installed(name)}
    return {name: make(problem).turn() for name, make in contenders.items() if name not in ("plain", "engine")}


def test_peers_find_the_hypergradient_that_the_engine_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    found = run(1, tmp_path, peers)
    exact = found.pop("exact")
    assert found.keys() >= {"ours", "central"}
    for name, values in found.items():
        cosine = torch.cosine_similarity(values - values.mean(), exact - exact.mean(), dim=0)
        assert cosine > (0.99 if name == "ours" else 0.9999), name


def test_gpu_script_is_sound_shell() -> None:
    subprocess.run(["bash", "-n", str(FOLDER / "gpu.sh")], check=True)


@pytest.mark.slow
def test_throughput_writes_a_row_for_every_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ["loss chunks", "DWM, eager"]
    options = ["--steps", "2", "--rounds", "1", "--precision", "bf16", "--contenders", *few]
    call(monkeypatch, "throughput", tmp_path, *options)
    rows = json.loads((tmp_path / "throughput-cpu-tiny.json").read_text())["result"]
    assert list(rows) == few
    for row in rows.values():
        assert row["tokens_per_s_per_worker"]["median"] > 0
        assert row["peak_gib"] > 0
        assert "mfu" not in row, "a CPU has no known peak"


@pytest.mark.slow
def test_scaling_puts_the_plan_beside_what_was_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call(monkeypatch, "scaling", tmp_path, "--steps", "3", "--rounds", "1", "--worlds", "1", "2")
    rows = json.loads((tmp_path / "scaling-cpu-tiny.json").read_text())["result"]
    assert rows["1, uniform"]["predicted_bytes"] == 0
    assert rows["2, uniform"]["predicted_bytes"] > 0  # what was sent is no test's: others use the device, too
    assert rows["2, DWM"]["predicted_bytes"] > rows["2, uniform"]["predicted_bytes"]


@pytest.mark.slow
def test_gradient_features_are_compared_with_traker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trak", reason="traker (extra `oracle`) is not installed")
    options = ["--rounds", "1", "--features", "256", "--sequences", "5", "--batch", "3"]
    call(monkeypatch, "selection_dsdm", tmp_path, *options)
    result = json.loads((tmp_path / "selection_dsdm-cpu-tiny.json").read_text())["result"]
    assert result["dense_over_traker"]["median"] > 0 and result["traker"] == "0.3.2"
