"""The copy of a run folder elsewhere: whole at every moment, and a run folder again where that is gone."""

from __future__ import annotations

import dataclasses
import os
import shutil
import threading
from pathlib import Path

import pytest
from orchestration.conftest import wait_for
from synthetic import tiny_config

from ray_dwm.config import RunConfig
from ray_dwm.engine.saved import list_checkpoints
from ray_dwm.errors import ConfigError, UserError
from ray_dwm.orchestration import mirror
from ray_dwm.orchestration.mirror import Mirror, prepare_mirror, prove

GONE = ("stop", "running", ".lock", "config.yaml.tmp", "checkpoints/step_000000030.tmp/__0_0.distcp")


def write(config: RunConfig, name: str, text: str = "") -> None:
    path = config.run_dir / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text or name)


def save(config: RunConfig, step: int, text: str = "") -> None:
    """A checkpoint as a run leaves it."""
    for file in ("__0_0.distcp", "__1_0.distcp", "identity.json", ".metadata"):
        write(config, f"checkpoints/step_{step:09d}/{file}", f"{step} {file} {text}")


def content(folder: Path) -> dict[str, str]:
    return {p.relative_to(folder).as_posix(): p.read_text() for p in folder.rglob("*") if p.is_file()}


def copied(config: RunConfig) -> Path:
    return Path(config.mirror.removeprefix("file://")) / config.name


@pytest.fixture
def config(shards: dict[str, Path], tmp_path: Path) -> RunConfig:
    """A run folder of two checkpoints, and what is not for copying."""
    config = tiny_config(shards, tmp_path / "runs", f"mirror=file://{tmp_path / 'elsewhere'}", "name=x")
    for name in ("config.yaml", "metrics.jsonl", "weights/part-0.parquet", "summary.json", *GONE):
        write(config, name)
    for step in (10, 20):
        save(config, step)
    return config


def without_passing(files: dict[str, str]) -> dict[str, str]:
    return {name: text for name, text in files.items() if name not in GONE}


@pytest.mark.parametrize("address", ["", "fsspec+memory://bucket/runs"])
def test_a_folder_that_is_gone_comes_back(config: RunConfig, capsys: pytest.CaptureFixture[str], address: str) -> None:
    config = dataclasses.replace(config, mirror=address or config.mirror)
    before = without_passing(content(config.run_dir))
    prepare_mirror(config)
    with Mirror(config):
        pass
    if not address:
        assert content(copied(config)) == before
    config.run_dir.rename(config.run_dir.with_name("lost"))
    prepare_mirror(config)
    assert content(config.run_dir) == before
    assert "comes from" in capsys.readouterr().out
    with Mirror(config) as again:
        assert address or again._sent == mirror._files(config.run_dir)  # nothing of it is copied back
    assert [path.name for path in config.run_dir.parent.iterdir() if path.name not in ("x", "lost")] == []


def test_only_what_has_changed_is_copied_again(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with Mirror(config):
        pass
    sent: list[str] = []
    send = Mirror._send_one
    monkeypatch.setattr(Mirror, "_send_one", lambda self, path: sent.append(path) or send(self, path))
    with Mirror(config):
        write(config, "metrics.jsonl", "more")
    assert sent == ["metrics.jsonl"]


def test_what_is_pruned_or_rolled_back_goes_there_too(config: RunConfig) -> None:
    with Mirror(config) as kept:
        kept.copy()
        save(config, 30)
        for path in list_checkpoints(config.run_dir / "checkpoints")[:2]:
            for file in path.iterdir():
                file.unlink()
        (config.run_dir / "weights/part-0.parquet").unlink()
    assert content(copied(config)) == without_passing(content(config.run_dir))


def test_what_was_pruned_before_a_kill_goes_there_at_the_next_start(config: RunConfig) -> None:
    with Mirror(config):
        pass
    shutil.rmtree(config.run_dir / "checkpoints/step_000000010")
    save(config, 30)
    for name in ("checkpoints/step_000000005/__0_0.distcp", "evaluation.json"):  # a kill while it was sent; another's
        (copied(config) / name).parent.mkdir(exist_ok=True)
        (copied(config) / name).write_text(name)
    with Mirror(config):
        pass
    before = without_passing(content(config.run_dir))
    assert content(copied(config)) == {**before, "evaluation.json": "evaluation.json"}


@pytest.mark.parametrize("broken", ["__1_0.distcp", "metrics.jsonl"])
def test_a_checkpoint_without_its_parts_or_its_log_is_none(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    with Mirror(config):
        pass
    save(config, 30)
    write(config, "metrics.jsonl", "more")
    send = Mirror._send_one

    def fails(self: Mirror, path: str) -> bool:
        if path.endswith(broken):
            raise OSError("no network")
        return send(self, path)

    monkeypatch.setattr(Mirror, "_send_one", fails)
    with Mirror(config):
        pass
    assert [path.name for path in list_checkpoints(copied(config) / "checkpoints")] == [
        "step_000000010",
        "step_000000020",
    ]
    assert "lacks what was written last: no network" in (config.run_dir / "messages.log").read_text()
    config.run_dir.rename(config.run_dir.with_name("lost"))
    prepare_mirror(config)
    assert len(list_checkpoints(config.run_dir / "checkpoints")) == 2
    assert not (config.run_dir / "checkpoints/step_000000030").exists()


def test_a_checkpoint_that_is_replaced_is_none_meanwhile(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    with Mirror(config):
        pass
    save(config, 20, "of another world size")
    seen: list[list[str]] = []
    send = Mirror._send_one

    def look(self: Mirror, path: str) -> bool:
        if path.endswith(".distcp"):
            seen.append([p.name for p in list_checkpoints(copied(config) / "checkpoints")])
        return send(self, path)

    monkeypatch.setattr(Mirror, "_send_one", look)
    with Mirror(config):
        pass
    assert seen == [["step_000000010"]] * 2
    assert content(copied(config)) == without_passing({**content(config.run_dir)})


def test_a_mirror_that_is_further_is_not_written_over(config: RunConfig) -> None:
    with Mirror(config):
        pass
    (config.run_dir / "checkpoints/step_000000020/.metadata").unlink()
    with pytest.raises(UserError, match=r"holds step 20 of x, run folder .* only step 10: remove the folder"):
        prepare_mirror(config)
    save(config, 30)
    prepare_mirror(config)


def test_a_failing_mirror_is_said_once_and_tried_again(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "_POLL_S", 0.01)
    monkeypatch.setattr(mirror, "_LOG_S", 0.02)
    send, failed = Mirror._send_one, []

    def fails(self: Mirror, path: str) -> bool:
        if len(failed) < 9:
            failed.append(path)
            raise OSError("slow down")
        return send(self, path)

    monkeypatch.setattr(Mirror, "_send_one", fails)
    with Mirror(config) as kept:
        wait_for((copied(config) / "summary.json").exists, "a copy that succeeds")
        assert kept._thread.is_alive()
    told = (config.run_dir / "messages.log").read_text()
    assert told == f"[x] {config.mirror} cannot be written: slow down\n"
    assert without_passing(content(config.run_dir)) == content(copied(config))


def test_a_folder_that_is_away_for_a_while_ends_nothing(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "_POLL_S", 0.01)
    failed: list[object] = []

    def away(*arguments: object) -> None:
        failed.append(arguments)
        raise OSError("stale file handle")

    def away_at_first(folder: Path) -> list[Path]:
        if len(failed) < 6 and threading.current_thread() is not threading.main_thread():
            away(folder)
        return list_checkpoints(folder)

    monkeypatch.setattr(mirror, "list_checkpoints", away_at_first)
    monkeypatch.setattr(mirror, "note", away)
    with Mirror(config):
        wait_for((copied(config) / "summary.json").exists, "a copy that succeeds")
    assert len(failed) >= 6
    assert without_passing(content(config.run_dir)) == content(copied(config))


@pytest.mark.parametrize(
    ("address", "kind", "message"),
    [
        ("ftp9://host/runs", ConfigError, r"mirror is 'ftp9://host/runs', which pyarrow cannot open"),
        ("file:///proc/runs", UserError, r"mirror file:///proc/runs cannot be written and read \(.*see to its address"),
    ],
)
def test_an_address_that_does_not_serve(
    shards: dict[str, Path], tmp_path: Path, address: str, kind: type[UserError], message: str
) -> None:
    with pytest.raises(kind, match=message):
        prove(tiny_config(shards, tmp_path, f"mirror={address}"))
    assert not os.listdir(tmp_path)


def test_without_a_mirror_nothing_happens(shards: dict[str, Path], tmp_path: Path) -> None:
    config = tiny_config(shards, tmp_path / "runs", "name=x")
    prepare_mirror(config)
    with Mirror(config):
        pass
    assert not (tmp_path / "runs").exists()
