"""`ray-dwm doctor`: what each check makes of what is there, and the command on a real cluster."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from orchestration.conftest import ROOT, Console
from packaging.requirements import Requirement
from synthetic import tiny_config

from ray_dwm.config import RunConfig, load, to_yaml
from ray_dwm.data.manifest import file_sha256
from ray_dwm.engine.selftest import AttentionProbe, GroupProbe
from ray_dwm.errors import ResourceError
from ray_dwm.orchestration import doctor, doctor_config, doctor_nodes, doctor_probes
from ray_dwm.orchestration.doctor_nodes import Gpu, NodeFacts
from ray_dwm.orchestration.findings import Finding, has_failed, run_check

GIB = 2**30
H100 = Gpu(name="H100", memory_mib=81559, driver="570.1", compute_capability="9.0")
A100 = Gpu(name="A100", memory_mib=40960, driver="570.1", compute_capability="8.0")


def node(host: str = "a", **other: Any) -> NodeFacts:
    facts: dict[str, Any] = {
        "host": host,
        "address": "10.0.0.1",
        "python": "3.11.7",
        "packages": {"torch": "2.13.0", "ray": "2.60.0"},
        "gpus": (),
        "open_files": 65536,
        "shm_bytes": 8 * GIB,
        "tmp_free_bytes": 50 * GIB,
        "tmp_total_bytes": 100 * GIB,
        "wandb_key": True,
        "traps": (),
        "resources": {"CPU": 8.0, "object_store_memory": 4.0 * GIB},
    }
    return NodeFacts(**facts | other)


def config(*overrides: str) -> RunConfig:
    return load([], ["train.micro_batch=1", *overrides])


@pytest.mark.parametrize(
    ("python", "have", "state", "words"),
    [
        ("3.11.7", {"torch": "2.13.0+cpu", "ray": "2.60.0"}, "ok", "torch 2.13.0+cpu"),
        ("3.10.1", {"torch": "2.13.0", "ray": "2.60.0"}, "failed", "python 3.10.1 is not >=3.11"),
        ("3.11.7", {"torch": "2.14.0", "ray": "2.60.0"}, "failed", "torch 2.14.0 is not <2.14,>=2.11"),
        ("3.11.7", {"torch": "2.13.0"}, "failed", "ray is not installed"),
    ],
)
def test_versions(python: str, have: dict[str, str], state: str, words: str) -> None:
    wanted = [Requirement("torch>=2.11,<2.14"), Requirement("ray[data]>=2.60,<2.61")]
    row = doctor_nodes.check_versions(">=3.11", wanted, python, have)
    assert row.state == state
    assert words in row.found


def test_the_requirements_are_those_of_the_package_without_its_extras() -> None:
    python, wanted = doctor_nodes.requirements()
    names = {requirement.name for requirement in wanted}
    assert python == ">=3.11"
    assert {"torch", "ray", "pyarrow", "wandb"} <= names
    assert not {"pytest", "torchopt"} & names


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"python": "3.11.9"}, None),
        ({"python": "3.12.1"}, "b (10.0.0.1): python 3.12 (here 3.11)"),
        ({"packages": {"torch": "2.12.0", "ray": "2.60.0"}}, "torch 2.12.0 (here 2.13.0)"),
        ({"packages": {"torch": "2.13.0"}}, "ray none (here 2.60.0)"),
    ],
)
def test_versions_on_nodes(other: dict[str, Any], words: str | None) -> None:
    here = node()
    row = doctor_nodes.check_same_versions(here.python, here.packages, [here, node("b", **other)])
    assert row.state == ("failed" if words else "ok")
    assert words is None or (row.found.startswith("b (") and words in row.found)


@pytest.mark.parametrize(
    ("gpus", "asked", "state"),
    [((), 0, "ok"), ((), 1, "failed"), ((H100, H100), 1, "ok"), ((H100, A100), 1, "warning"), ((H100,), 0, "warning")],
)
def test_gpus(gpus: tuple[Gpu, ...], asked: int, state: str) -> None:
    row = doctor_nodes.check_gpus([node(), node("b", gpus=gpus)], config(f"cluster.gpus_per_worker={asked}"))
    assert row.state == state
    if gpus == (H100, H100):
        assert row.found == "b (10.0.0.1): 2 x H100 (80 GiB, driver 570.1, capability 9.0)"
        assert doctor_nodes.check_gpus([node(gpus=gpus)], None).state == "ok"


@pytest.mark.parametrize(
    ("other", "states"),
    [({}, ["ok", "ok"]), ({"open_files": 1024}, ["warning", "ok"]), ({"tmp_free_bytes": 4 * GIB}, ["ok", "failed"])],
)
def test_limits(other: dict[str, Any], states: list[str]) -> None:
    rows = doctor_nodes.check_limits([node(), node("b", **other)])
    assert [row.state for row in rows] == states
    assert all("b (10.0.0.1)" in row.found for row in rows if row.state != "ok")


@pytest.mark.parametrize(
    ("variables", "states"),
    [
        ({}, []),
        ({"RAY_TRAIN_V2_ENABLED": "1"}, []),
        ({"RAY_TRAIN_V2_ENABLED": "0"}, ["failed"]),
        ({"http_proxy": "http://proxy"}, ["warning"]),
        ({"http_proxy": "http://proxy", "no_proxy": "localhost,10.0.0.1"}, []),
        ({"GLOO_SOCKET_IFNAME": "lo"}, []),
        ({"NCCL_SOCKET_IFNAME": "^docker"}, []),
        ({"NCCL_SOCKET_IFNAME": "nosuch0"}, ["failed"]),
    ],
)
def test_traps(variables: dict[str, str], states: list[str]) -> None:
    assert [trap.state for trap in doctor_nodes.traps(variables, "10.0.0.1")] == states


def test_a_trap_of_several_nodes_is_one_row() -> None:
    trap = Finding("environment", "failed", "X is off", "unset X")
    assert doctor_nodes.check_traps((), [node()])[0].state == "ok"
    nodes = [node(traps=(trap,)), node("b", traps=(trap,)), node("c")]
    expected = "X is off (this process, a (10.0.0.1), b (10.0.0.1))"
    assert doctor_nodes.check_traps((trap,), nodes) == [replace(trap, found=expected)]


@pytest.mark.parametrize(("skew", "state"), [(0.0, "ok"), (4.9, "ok"), (61.0, "warning")])
def test_clocks(skew: float, state: str) -> None:
    assert doctor_nodes.check_clocks([node(), node("b", skew_s=skew)]).state == state


@pytest.mark.parametrize(
    ("mode", "key", "state"), [("online", True, "ok"), ("online", False, "failed"), ("auto", False, "ok")]
)
def test_wandb(mode: str, key: bool, state: str) -> None:
    row = doctor_nodes.check_wandb(config(f"tracking.wandb={mode}"), [node(), node("b", wandb_key=key)])
    assert row.state == state
    assert state == "ok" or ("b (10.0.0.1)" in row.found and "a (" not in row.found)


@pytest.mark.parametrize(("rows", "state", "words"), [(6400, "ok", "1.00 epochs"), (1000, "warning", "6.40 epochs")])
def test_epochs(rows: int, state: str, words: str) -> None:
    row = doctor_config.check_epochs(config("train.steps=100"), rows, tokens=100)
    assert row.state == state
    assert f"0.6 M tokens are {words}" in row.found


@pytest.mark.parametrize(
    ("overrides", "checkpoints"),
    [
        ([], 3),  # two kept, and one more while it is written
        (["checkpoint.keep=5"], 5),  # the run makes four
        (["checkpoint.keep_every=250"], 7),
    ],
)
def test_disk_needed(overrides: list[str], checkpoints: int) -> None:
    run = config("train.steps=1000", "checkpoint.every=250", "tracking.weights_every=10", *overrides)
    expected = {"checkpoints": checkpoints * 12000, "exported LM": 4000, "weights": 100 * 64 * 26}
    assert doctor_config.disk_needed(run, 1000) == expected


@pytest.mark.parametrize(("free", "used", "state"), [(60.0, 0.0, "ok"), (40.0, 0.0, "failed"), (40.0, 20.0, "ok")])
def test_disk(free: float, used: float, state: str) -> None:
    # 1.345e9 parameters: three checkpoints of 15.04 GiB and an LM of 5.01 GiB are 50.13 GiB.
    run = config("lm.preset=1.3b", "train.steps=1000")
    row = doctor_config.check_disk(run, 32000, int(free * GIB), int(used * GIB))
    assert row.state == state
    assert "about 50.1" in row.found


@pytest.mark.parametrize(
    ("other", "found"),
    [
        ({}, []),
        ({"resources": {"CPU": 2.0, "object_store_memory": 1.5 * GIB}}, []),  # it holds two workers
        ({"resources": {"CPU": 8.0, "object_store_memory": 1.5 * GIB}}, ["4 workers may ask for 2063"]),
        ({"shm_bytes": 64 * 2**20}, ["outside of /dev/shm (64 MiB)"]),
    ],
)
def test_object_store(other: dict[str, Any], found: list[str]) -> None:
    rows = doctor_config.check_object_store(config("cluster.workers=4"), [node("b", **other)], 5 * 2**20)
    assert [row.state for row in rows] == ["warning" for _ in found] or ["ok"]
    assert all(words in row.found for words, row in zip(found, rows, strict=False))


@pytest.mark.parametrize(("free", "state"), [(8.0, "ok"), (1.0, "warning")])
def test_resources_that_others_hold(free: float, state: str) -> None:
    assert doctor_config.check_free(config(), 2, {"CPU": 8.0}, {"CPU": free}).state == state
    elastic = config("cluster.workers=[1,4]")
    row = doctor_config.check_free(elastic, 3, {"CPU": 3.0}, {"CPU": free})
    assert row.state == state
    assert row.found.startswith("the run holds 3 of 3 CPUs, 0 of 0 GPUs with 3 of at most 4 workers")


@pytest.mark.parametrize(
    ("trains", "forward", "overrides", "state", "words"),
    [
        (("flash", "math"), ("math",), [], "ok", "lm.attention=auto takes flash"),
        (("flash", "math"), ("math",), ["lm.attention=cudnn"], "failed", "lm.attention=cudnn takes cudnn"),
        (("flash", "math"), ("math",), ["lm.attention=eager"], "ok", "takes no kernel"),
        (("flash",), (), [], "ok", "jvp and exact cannot work"),
        (("flash",), (), ["bilevel.estimator=jvp"], "failed", "jvp and exact cannot work"),
        ((), (), [], "failed", "none run"),
    ],
)
def test_attention(
    trains: tuple[str, ...], forward: tuple[str, ...], overrides: list[str], state: str, words: str
) -> None:
    probe = AttentionProbe(device="H100", trains=trains, forward_mode=forward, auto=trains[0] if trains else "none")
    row = doctor_probes.judge_attention(probe, config(*overrides), "heads of 64")
    assert row.state == state
    assert words in row.found
    assert bool(row.remedy) == (state == "failed")


@pytest.mark.parametrize(
    ("right", "error", "state"), [(True, 1e-8, "ok"), (False, 1e-8, "failed"), (True, 1e-2, "failed")]
)
def test_group(right: bool, error: float, state: str) -> None:
    probe = GroupProbe(backend="gloo", world=2, device="CPU", sum_is_right=right, fsdp_error=error, bytes_per_s=2.5e9)
    row = doctor_probes.judge_group(probe)
    assert row.state == state
    assert "2.50 GB/s" in row.found


def test_ranks_are_told_of_each_other() -> None:
    places = [("n1", "10.0.0.1", ["0"], 7000), ("n1", "10.0.0.1", ["1"], 7001), ("n2", "10.0.0.2", ["3"], 7002)]
    told = doctor_probes.group_environments(places)
    assert {t["MASTER_ADDR"] + ":" + t["MASTER_PORT"] for t in told} == {"10.0.0.1:7000"}
    assert [t["RANK"] for t in told] == ["0", "1", "2"]
    assert [t["CUDA_VISIBLE_DEVICES"] for t in told] == ["0,1", "0,1", "3"]
    assert [t["LOCAL_RANK"] for t in told] == ["0", "1", "0"]
    on_cpus = doctor_probes.group_environments([("n1", "10.0.0.1", [], 7000), ("n1", "10.0.0.1", [], 7001)])
    assert [t["LOCAL_RANK"] for t in on_cpus] == ["0", "1"]
    assert on_cpus[0]["CUDA_VISIBLE_DEVICES"] == "", "as the run's workers, they must not take a GPU of their node"


def test_what_a_node_says_of_the_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor_probes, "_SEE_TIMEOUT_S", 0.3)
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / "driver").write_text("token")
    data = tmp_path / "manifest.json"
    data.write_text("{}")
    digests = {str(data): file_sha256(data)}

    def visit(folder: Path, files: dict[str, str]) -> list[str]:
        return doctor_probes.visit(str(folder), "node", "token", files)

    assert visit(tmp_path / "probe", digests) == []
    assert (tmp_path / "probe" / "node").read_text() == "token"
    assert visit(tmp_path / "other", digests) == [f"does not see {tmp_path}"]
    assert visit(tmp_path / "probe", {"/nowhere/x": ""}) == ["does not see /nowhere/x"]
    assert visit(tmp_path / "probe", {str(data): "0" * 64}) == [f"has another {data}"]


def test_sets_that_train_would_make_first(shards: dict[str, Path], tmp_path: Path) -> None:
    corpus = ROOT / "corpus"
    missing = {**shards, "target": tmp_path / "target"}
    texts = [f"prepare.tokenizer={corpus / 'tokenizer'}", f"prepare.target={corpus / 'target'}"]
    (row,) = doctor_config.check_sets(tiny_config(missing, tmp_path, *texts))
    assert row.state == "warning"
    assert row.found == f"not there yet, and made by `train` first: {tmp_path / 'target'}"
    assert not doctor_config.data_are_there(tiny_config(missing, tmp_path))
    assert doctor_config.data_are_there(tiny_config(shards, tmp_path))
    assert [row.state for row in doctor_config.check_sets(tiny_config(shards, tmp_path))] == ["ok", "ok"]
    assert list(tmp_path.iterdir()) == []


def test_a_check_ends_whatever_it_does() -> None:
    def broken() -> list[Finding]:
        raise ValueError("first\nsecond")

    def refused() -> list[Finding]:
        raise ResourceError("no room: make room")

    def hanging() -> list[Finding]:
        time.sleep(5)
        return []

    assert run_check("x", broken, 5)[0].found == "ValueError: first"
    assert run_check("x", refused, 5) == [Finding("x", "failed", "no room", "make room")]
    assert run_check("x", hanging, 0.1)[0].found == "no answer within 0.1 s"
    assert run_check("x", list, 5) == []


def test_an_address_at_which_something_else_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_ANSWER_S", 2.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{silent.getsockname()[1]}")
        begin = time.monotonic()
        rows = {row.check: row for row in doctor.Doctor(None).examine()}
    assert time.monotonic() - begin < 30
    assert rows["versions"].state == "ok"
    assert rows["Ray"].state == "failed"
    assert rows["Ray"].found.startswith("no Ray cluster answers at 127.0.0.1:")
    assert {rows[name].state for name in ("data", "disk", "GPUs", "storage", "process group")} == {"skipped"}


def rows_of(console: Console, run: RunConfig, code: int) -> dict[str, Finding]:
    file = console.folder / "run.yaml"
    file.write_text(to_yaml(run))
    command = [sys.executable, "-m", "ray_dwm.cli", "doctor", "--config", str(file), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=console.environment, cwd=ROOT, timeout=180)
    assert done.returncode == code, done.stderr
    return {row["check"]: Finding(**row) for row in json.loads(done.stdout)}


def test_on_a_cluster(shards: dict[str, Path], console: Console, tmp_path: Path) -> None:
    good = tiny_config(shards, tmp_path / "new" / "runs", "cluster.workers=2", "train.micro_batch=4", "name=good")
    console.environment = {**console.environment, "COLUMNS": "160"}
    output = console.finish(good, console.start(good, "doctor"))
    for words in ("2 x CPU over gloo: all-reduce right", "lm.attention=auto takes", "written and read by 1 node"):
        assert words in output
    assert "failed" not in output
    assert not (tmp_path / "new").exists()

    (tmp_path / "file").write_text("")
    missing = {**shards, "train": tmp_path / "nowhere"}
    bad = tiny_config(missing, tmp_path / "file" / "runs", "cluster.workers=8", "train.micro_batch=1")
    rows = rows_of(console, bad, code=2)
    assert {name for name, row in rows.items() if row.state == "failed"} == {
        "data",
        "run folder",
        "resources",
        "storage",
    }
    assert "nowhere holds no manifest.json" in rows["data"].found
    assert rows["run folder"].remedy == "choose another storage=..."
    assert rows["storage"].remedy == "choose another storage=..."
    assert rows["resources"].found.startswith("the run needs 10 CPUs")
    assert "lower cluster.workers" in rows["resources"].remedy
    assert rows["process group"].state == rows["disk"].state == "skipped"
    assert has_failed(rows.values())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "good.log", "good.yaml", "run.yaml"]
