"""What each check of `ray-dwm doctor` makes of what is there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from packaging.requirements import Requirement

from ray_dwm.config import RunConfig, load
from ray_dwm.engine.selftest import AttentionProbe, GroupProbe
from ray_dwm.orchestration import doctor_config, doctor_nodes, doctor_probes
from ray_dwm.orchestration.doctor_nodes import Gpu, NodeFacts
from ray_dwm.orchestration.findings import Finding

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
        "cores": 8,
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
    ("gpus", "counted", "asked", "state", "words"),
    [
        ((), 0, 0, "ok", "none is asked for"),
        ((), 0, 1, "failed", "no node has one"),
        ((H100, H100), 2, 1, "ok", "b (10.0.0.1): 2 x H100 (80 GiB, driver 570.1, capability 9.0)"),
        ((H100, H100), 1, 1, "ok", "2 x H100"),
        ((H100, H100), 0, 1, "warning", "b (10.0.0.1): nvidia-smi shows 2, Ray counts 0"),
        ((), 2, 1, "warning", "nvidia-smi shows 0, Ray counts 2"),
        ((H100, A100), 2, 1, "warning", "1 x A100"),
        ((H100,), 1, 0, "warning", "the run uses none"),
    ],
)
def test_gpus(gpus: tuple[Gpu, ...], counted: int, asked: int, state: str, words: str) -> None:
    nodes = [node(), node("b", gpus=gpus, resources={"CPU": 8.0, "GPU": float(counted)})]
    row = doctor_nodes.check_gpus(nodes, config(f"cluster.gpus_per_worker={asked}"))
    assert row.state == state
    assert words in row.found
    assert bool(row.remedy) == (state != "ok")


def test_gpus_of_a_dwm_that_is_not_learnt_are_not_asked_for() -> None:
    row = doctor_nodes.check_gpus([node()], config("cluster.dwm_gpus=1", "weighting.method=uniform"))
    assert row.found == "none, and none is asked for"


def test_without_a_configuration_every_gpu_is_tried() -> None:
    gpus = node("b", gpus=(H100, H100, H100), resources={"CPU": 8.0, "GPU": 3.0})
    assert doctor_nodes.check_gpus([node(), gpus], None).state == "ok"
    run = doctor_config.stand_in([node(), gpus])
    assert (run.cluster.workers, run.cluster.gpus_per_worker) == (3, 1)
    run = doctor_config.stand_in([node()])
    assert (run.cluster.workers, run.cluster.gpus_per_worker) == (2, 0)


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


@pytest.mark.parametrize(
    ("rows", "stored", "state", "words"),
    [
        (6400, False, "ok", "1.00 epochs of the training set"),
        (1000, False, "warning", "6.40 epochs"),
        (6463, True, "ok", "0.99 epochs of the training set, the first in stored order"),  # but for a part of a batch
        (6464, True, "warning", "0.99 epochs of the training set, in stored order: the last part"),
        (6464, False, "ok", "0.99 epochs of the training set"),
    ],
)
def test_epochs(rows: int, stored: bool, state: str, words: str) -> None:
    row = doctor_config.check_epochs(config("train.steps=100"), rows, tokens=100, stored=stored)
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
    assert doctor_config.check_free(config(), 2, {"CPU": 8.0}, [{"CPU": free}], 8).state == state
    elastic = config("cluster.workers=[1,4]")
    row = doctor_config.check_free(elastic, 3, {"CPU": 3.0}, [{"CPU": free}], 8)
    assert row.state == state
    assert row.found.startswith("the run holds 3 of 3 CPUs, 0 of 0 GPUs with 3 of at most 4 workers")


def test_resources_that_lie_apart_or_are_no_cores() -> None:
    total, run = {"CPU": 8.0}, config("cluster.cpus_per_worker=2")
    assert doctor_config.check_free(run, 2, total, [{"CPU": 3.0}, {"CPU": 3.0}], 8).state == "ok"
    row = doctor_config.check_free(run, 2, total, [{"CPU": 1.0}, {"CPU": 5.0}, {}], 8)
    assert row.state == "ok"
    row = doctor_config.check_free(run, 2, total, [{"CPU": 1.0}] * 6, 8)
    assert row.state == "warning"
    assert "now only 0 of 2 workers find a node with room" in row.found
    row = doctor_config.check_free(run, 2, total, [{"CPU": 8.0}], 2)
    assert row.state == "warning"
    assert row.found.endswith("and its 2 workers share 2 cores")


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
    ("cpus", "found"),
    [(8.0, "others hold what a worker needs on 1 of 1 node"), (0.0, "no node can hold a worker")],
)
def test_attention_is_not_tried_where_no_worker_finds_room(
    monkeypatch: pytest.MonkeyPatch, cpus: float, found: str
) -> None:
    monkeypatch.setattr(doctor_probes, "alive_nodes", lambda: [{"NodeID": "a", "Resources": {"CPU": cpus}}])
    rows = doctor_probes.check_attention(config(), 64, 128, {"a": {"CPU": 0.0}}, 1)
    assert rows == [Finding("attention", "skipped", found)]


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
