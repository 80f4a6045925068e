"""`ray-dwm doctor`: the limits it runs under, and the command on a real cluster."""

from __future__ import annotations

import fcntl
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from orchestration.conftest import PATIENCE_S, ROOT, Console, held
from synthetic import tiny_config
from typer.testing import CliRunner

from ray_dwm.cli import app
from ray_dwm.config import RunConfig, load, to_yaml
from ray_dwm.data.manifest import file_sha256
from ray_dwm.errors import ResourceError
from ray_dwm.orchestration import cluster, doctor, doctor_config, doctor_probes, storage_visit
from ray_dwm.orchestration.dwm_actor import actor_name
from ray_dwm.orchestration.findings import Finding, has_failed, run_check


def test_a_run_folder_that_is_complete_or_in_use(shards: dict[str, Path], tmp_path: Path) -> None:
    run = tiny_config(shards, tmp_path)
    run.run_dir.mkdir()
    assert "exists and is continued" in doctor_config.check_run_folder(run, False).found
    with (run.run_dir / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        row = doctor_config.check_run_folder(run, False)
    assert row.state == "failed"
    assert row.found == f"{run.run_dir} is in use by another process"
    (run.run_dir / "summary.json").write_text("{}")
    row = doctor_config.check_run_folder(run, False)
    assert row.state == "warning"
    assert "complete already" in row.found


def test_what_a_node_says_of_the_storage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_visit, "SEE_TIMEOUT_S", 0.3)
    (tmp_path / "probe").mkdir()
    (tmp_path / "probe" / "driver").write_text("token")
    data = tmp_path / "manifest.json"
    data.write_text("{}")
    digests = {str(data): file_sha256(data)}

    def visit(folder: Path, files: dict[str, str]) -> list[str]:
        return storage_visit.visit(str(folder), "node", "token", files)

    assert visit(tmp_path / "probe", digests) == []
    assert (tmp_path / "probe" / "node").read_text() == "token"
    assert visit(tmp_path / "other", digests) == [f"does not see {tmp_path}"]
    assert visit(tmp_path / "probe", {"/nowhere/x": ""}) == ["does not see /nowhere/x"]
    assert visit(tmp_path / "probe", {str(data): "0" * 64}) == [f"has another {data}"]


def test_sets_that_train_would_make_first(
    shards: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = ROOT / "corpus"
    missing = {**shards, "target": tmp_path / "target"}
    texts = [f"prepare.tokenizer={corpus / 'tokenizer'}", f"prepare.target={corpus / 'target'}"]
    (row,) = doctor_config.check_sets(tiny_config(missing, tmp_path, *texts))
    assert row.state == "warning"
    assert row.found == f"not there yet, `train` makes them first: {tmp_path / 'target'}"
    assert not doctor_config.data_are_there(tiny_config(missing, tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    (row,) = doctor_config.check_sets(tiny_config(missing, tmp_path, *texts))
    assert "the job's working folder, which is temporary" in row.found
    assert "absolute paths" in row.remedy
    assert doctor_config.data_are_there(tiny_config(shards, tmp_path))
    assert [row.state for row in doctor_config.check_sets(tiny_config(shards, tmp_path))] == ["ok", "ok"]


@pytest.mark.parametrize(
    ("options", "state", "words"),
    [
        (["data.selection=random"], "warning", "12.80 epochs"),
        (["data.selection=random", "selection.budget=4096"], "ok", "the training set"),
        (
            ["data.selection=curriculum", "selection.budget=4096", "train.steps=4"],
            "warning",
            "in stored order: the last",
        ),
    ],
)
def test_epochs_are_of_what_is_selected_before_training(
    shards: dict[str, Path], tmp_path: Path, options: list[str], state: str, words: str
) -> None:
    run = tiny_config(shards, tmp_path, "selection.budget=320", "train.steps=32", *options)
    data, epochs = doctor_config.check_sets(run)
    assert f"before training, {run.data.selection} selects {run.selection.budget // 16} of 256" in data.found
    assert epochs.state == state and words in epochs.found


def test_a_selection_that_cannot_be_made_is_found(shards: dict[str, Path], tmp_path: Path) -> None:
    run = tiny_config(shards, tmp_path, "data.selection=random", "selection.budget=4097")
    (row,) = run_check("data", lambda: doctor_config.check_sets(run), 10)
    assert row.state == "failed" and "selection.budget is 4097 tokens" in row.found
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_storage_check_that_is_cut_off_goes_with_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_exit: list[Callable[[], None]] = []
    hangs, over, storage = threading.Event(), threading.Event(), tmp_path / "new" / "runs"

    def hanging(*rest: Any) -> tuple[list[Any], list[Finding]]:
        hangs.set()
        over.wait(PATIENCE_S)
        return [], []

    def register(function: Callable[..., None], *arguments: Any) -> None:
        at_exit.append(partial(function, *arguments))

    monkeypatch.setattr(doctor_probes, "alive_nodes", list)
    monkeypatch.setattr(doctor_probes, "on_nodes", hanging)
    monkeypatch.setattr(doctor_probes, "atexit", SimpleNamespace(register=register, unregister=lambda function: None))
    (row,) = run_check("storage", lambda: doctor_probes.check_storage(storage, [], 1), 0.1)
    assert row.found == "no answer within 0.1 s" and hangs.wait(PATIENCE_S)
    assert len(list(storage.iterdir())) == 1
    for function in at_exit:
        function()
    assert list(tmp_path.iterdir()) == []
    over.set()


def test_texts_that_are_not_there_have_a_remedy(shards: dict[str, Path], tmp_path: Path) -> None:
    missing = {**shards, "target": tmp_path / "target"}
    run = tiny_config(missing, tmp_path, f"prepare.target={tmp_path / 'no'}")
    (row,) = run_check("data", lambda: doctor_config.check_sets(run), 10)
    assert row.found == f"prepare.target is '{tmp_path / 'no'}', no text files there"
    assert row.remedy.startswith("name a folder, file or glob of .jsonl")
    (tmp_path / "tokenizer.json").write_text("{}")
    run = tiny_config(
        missing, tmp_path, f"prepare.target={ROOT / 'corpus' / 'target'}", f"prepare.tokenizer={tmp_path}"
    )
    (row,) = run_check("data", lambda: doctor_config.check_sets(run), 60)
    assert "cannot be loaded (" in row.found
    assert row.remedy == "save it anew with `save_pretrained`"


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
    monkeypatch.setattr(doctor, "_ANSWER_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{silent.getsockname()[1]}")
        rows = {row.check: row for row in doctor.Doctor(None).examine()}
    assert rows["versions"].state == "ok"
    assert rows["Ray"].state == "failed"
    assert rows["Ray"].found.startswith("no Ray cluster answers at 127.0.0.1:")
    assert {rows[name].state for name in ("data", "disk", "GPUs", "storage", "process group")} == {"skipped"}


def test_an_address_at_which_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    # "auto" is the last cluster of this machine, also where it is long gone.
    monkeypatch.setattr(cluster, "canonicalize_bootstrap_address", lambda address: "127.0.0.1:9")
    for address in ("127.0.0.1:9", "auto"):
        with pytest.raises(ResourceError, match=rf"no Ray cluster answers at {address} \(.*refused\): start one"):
            doctor._probe_cluster(address)


def test_a_run_name_that_another_job_has(monkeypatch: pytest.MonkeyPatch) -> None:
    actors = {actor_name(load([], ["name=taken"]))}

    def get_actor(name: str, namespace: str) -> None:
        if name not in actors:
            raise ValueError(name)

    monkeypatch.setattr(doctor.ray, "get_actor", get_actor)
    assert doctor._check_name(load([], ["name=free"])).state == "ok"
    assert doctor._check_name(load([], ["name=taken", "storage=elsewhere"])).state == "ok"
    row = doctor._check_name(load([], ["name=taken"]))
    assert row.state == "failed"
    assert row.remedy == "wait for it, or choose another name=..."


def test_nothing_but_json_on_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    def examine(self: doctor.Doctor) -> list[Finding]:
        print("(raylet) WARNING: what Ray has to say")
        return [Finding("x", "failed", "found", "remedy")]

    monkeypatch.setattr(doctor.Doctor, "examine", examine)
    done = CliRunner().invoke(app, ["doctor", "--json"])
    assert done.exit_code == 2
    assert json.loads(done.stdout) == [{"check": "x", "state": "failed", "found": "found", "remedy": "remedy"}]
    assert "raylet" in done.stderr


@pytest.mark.slow
def test_on_a_cluster(shards: dict[str, Path], console: Console, tmp_path: Path) -> None:
    good = tiny_config(shards, tmp_path / "new" / "runs", "cluster.workers=2", "train.micro_batch=4", "name=good")
    console.environment = {**console.environment, "COLUMNS": "160"}
    output = console.finish(good, console.start(good, "doctor"))
    for words in ("2 x CPU over gloo: all-reduce right", "lm.attention=auto takes", "written and read by 1 node"):
        assert words in output
    assert "failed" not in output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good.log", "good.yaml"]


@pytest.fixture
def examine(driver: None, monkeypatch: pytest.MonkeyPatch) -> Callable[[RunConfig], dict[str, Finding]]:
    """The rows of a run, with this process as a driver, which it stays."""
    monkeypatch.setattr(doctor, "_shutdown", list)
    return lambda run: {row.check: row for row in doctor.Doctor(run).examine()}


def test_a_run_that_cannot_be(
    shards: dict[str, Path], examine: Callable[[RunConfig], dict[str, Finding]], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    missing = {**shards, "train": tmp_path / "nowhere"}
    bad = tiny_config(missing, tmp_path / "file" / "runs", "cluster.workers=8", "train.micro_batch=1")
    rows = examine(bad)
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
    assert rows["checksums"].found == "there are no data yet"
    assert rows["disk"].found == "there can be no run folder"
    assert rows["run name"].state == "ok"
    assert rows["attention"].state == "ok"  # a node that holds one worker is enough for it
    assert has_failed(rows.values())
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_on_a_cluster_that_others_use(
    shards: dict[str, Path], examine: Callable[[RunConfig], dict[str, Finding]], tmp_path: Path
) -> None:
    run = tiny_config(shards, tmp_path / "runs", "cluster.workers=2", "train.micro_batch=4")
    with held(7):
        rows = examine(run)
    assert not has_failed(rows.values())
    assert rows["resources"].state == "warning"
    assert rows["resources"].found.endswith("but now only 1 CPUs are free")
    assert rows["attention"].state == "ok"
    assert rows["process group"].state == "skipped"
    assert rows["process group"].found.startswith("others hold what the workers need")


@pytest.mark.slow
def test_through_ray_client(shards: dict[str, Path], console: Console, tmp_path: Path) -> None:
    run = tiny_config(shards, tmp_path / "runs", "cluster.workers=2", "train.micro_batch=4")
    file = tmp_path / "run.yaml"
    file.write_text(to_yaml(run))
    command = [sys.executable, "-m", "ray_dwm.cli", "doctor", "--config", str(file), "--json"]
    by_client = {**console.environment, "RAY_ADDRESS": console.environment["CLIENT_ADDRESS"]}
    done = subprocess.run(command, capture_output=True, text=True, env=by_client, cwd=ROOT, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["check"]: Finding(**row) for row in json.loads(done.stdout)}
    assert [rows[name].state for name in ("Ray", "resources", "storage", "attention", "process group")] == ["ok"] * 5
