"""One line an event, in two styles."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from ray_dwm import logs


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Other tests' processes speak as before."""
    monkeypatch.setattr(logs, "_bound", {})
    yield
    logs.setup("text")


def test_text_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup("text")
    logs.bind(attempt=2, rank=0)
    logs.say("warning: the weights concentrate", run="mine", entropy=0.5)
    logs.say("nobody's")
    logs.record("for collectors", ValueError("x"))
    assert capsys.readouterr().out == "[mine] warning: the weights concentrate\nnobody's\n"


def test_json_has_the_run_the_attempt_the_rank_and_the_step(capsys: pytest.CaptureFixture[str]) -> None:
    logs.setup("json")
    logs.say("before anything is known")
    logs.bind(run="mine", attempt=2, rank=1, step=7)
    logs.say("warning: low\nin two lines", fidelity=0.25)
    try:
        raise ValueError("no good")
    except ValueError as error:
        logs.record("it ends", error, step=8)
    logs.record("the run has failed", error="ValueError: no good")
    first, second, third, fourth = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert [first[key] for key in ("run", "attempt", "rank", "step")] == [None] * 4
    place = {"run": "mine", "attempt": 2, "rank": 1, "step": 7}
    told = {"level": "warning", "message": "low\nin two lines", "fidelity": 0.25}
    assert second == {"time": second["time"], **told, **place}
    assert second["time"].endswith("+00:00")
    assert (fourth["level"], fourth["error"]) == ("error", "ValueError: no good") and "traceback" not in fourth
    assert (third["level"], third["step"]) == ("error", 8) and third["traceback"].endswith("ValueError: no good")


@pytest.mark.parametrize(
    ("wanted", "job", "worker", "expected"),
    [
        ("auto", False, False, "text"),
        ("auto", True, False, "json"),
        ("auto", False, True, "json"),
        ("text", True, True, "text"),
        ("json", False, False, "json"),
    ],
)
def test_style(monkeypatch: pytest.MonkeyPatch, wanted: str, job: bool, worker: bool, expected: str) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    if job:
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert logs.style_of(wanted, worker) == expected
