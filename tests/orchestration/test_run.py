"""A SIGTERM before a run has begun, without a cluster: one line, exit code 1, nothing written."""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytest
from synthetic import tiny_config

from ray_dwm.errors import Stopped
from ray_dwm.orchestration import run


def waits(*arguments: Any) -> NoReturn:
    """Gets a SIGTERM while it waits, and passes over what is wrong with what it waits for."""
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pthread_sigmask(signal.SIG_BLOCK, [])  # Python runs the handler here
    except Exception:
        pass
    raise AssertionError("the SIGTERM was not heard")


@contextmanager
def claimed_by_another(*arguments: Any) -> Any:
    """A run folder that has to be waited for."""
    yield waits()


def interrupted(*arguments: Any) -> NoReturn:
    """Gets a Ctrl-C."""
    raise KeyboardInterrupt


def never(*arguments: Any) -> NoReturn:
    """In place of what trains."""
    raise AssertionError("it has begun")


@pytest.mark.parametrize(
    ("place", "meanwhile", "kind", "told"),
    [
        ("await_resources", waits, Stopped, r"^\[run\] stopped before it began: the same command starts it$"),
        ("prove_storage", waits, Stopped, r"^\[run\] stopped before it began: the same command starts it$"),
        ("claim", claimed_by_another, Stopped, r"^\[run\] stopped before it began: the same command starts it$"),
        ("await_resources", interrupted, KeyboardInterrupt, None),
    ],
)
def test_a_sigterm_while_a_place_is_waited_for_is_one_line(
    shards: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
    meanwhile: Any,
    kind: type[BaseException],
    told: str | None,
) -> None:
    config = tiny_config(shards, tmp_path / "runs")
    for name, found in (("connect", None), ("await_resources", 2), ("prove_storage", None)):
        monkeypatch.setattr(run, name, lambda *arguments, found=found: found)
    monkeypatch.setattr(run, place, meanwhile)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(kind, match=told) as raised:
        run.run(config, never)
    assert signal.getsignal(signal.SIGTERM) == before
    assert getattr(raised.value, "exit_code", 1) == 1
    assert not (tmp_path / "runs").exists()


def test_one_that_was_interrupted_before_has_begun(
    shards: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(shards, tmp_path / "runs")
    checkpoint = config.run_dir / "checkpoints" / "step_00000040"
    checkpoint.mkdir(parents=True)
    (checkpoint / ".metadata").touch()
    for name in ("check_checkpoint", "connect"):
        monkeypatch.setattr(run, name, lambda *arguments: None)
    monkeypatch.setattr(run, "await_resources", waits)
    with pytest.raises(Stopped, match=r"^\[run\] stopped before it went on from step 40: the same command continues$"):
        run.run(config, never)
