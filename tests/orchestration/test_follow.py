"""A watched job, without a cluster: broken connections, Ctrl-C, and what its end means."""

from __future__ import annotations

import asyncio
import io
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from ray.job_submission import JobDetails, JobStatus

from ray_dwm.errors import TrainingError
from ray_dwm.orchestration import follow
from ray_dwm.orchestration.follow import LEFT, Watch, exit_code


def details(status: str, code: int | None = None, message: str = "") -> JobDetails:
    return JobDetails(
        type="SUBMISSION",
        submission_id="a-1",
        status=JobStatus(status),
        entrypoint="",
        message=message,
        driver_exit_code=code,
    )


class Server:
    """In place of the job client: each connection sends the log from its start, up to where it breaks."""

    def __init__(self, *connections: Any, log: str = "one\ntwo\nthree\n", code: int = 0) -> None:
        self.connections, self.log, self.code = list(connections), log, code
        self.stopped = 0

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        """See JobSubmissionClient."""
        upto, error = self.connections.pop(0)
        for line in self.log[:upto].splitlines(keepends=True):
            yield line
        if isinstance(error, KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(60)
        if error is not None:
            raise error

    def get_job_logs(self, job: str) -> str:
        """See JobSubmissionClient."""
        return "" if self.connections else self.log

    def get_job_info(self, job: str) -> JobDetails:
        """See JobSubmissionClient."""
        if self.connections:
            return details("RUNNING")
        return details("FAILED" if self.code else "SUCCEEDED", self.code)

    def stop_job(self, job: str) -> None:
        """See JobSubmissionClient."""
        self.stopped += 1


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No waiting between tries."""
    monkeypatch.setattr(follow, "_PAUSE_S", 0.0)


@pytest.mark.parametrize(
    "connections",
    [
        [(None, None)],
        [(6, RuntimeError("closed with close code 1006")), (None, None)],
        [(9, OSError()), (2, TimeoutError()), (None, None)],
        [(0, OSError())],  # no web socket at all: the log comes at the end
    ],
)
def test_every_line_is_printed_once(capsys: pytest.CaptureFixture[str], connections: list[Any]) -> None:
    assert Watch(Server(*connections, code=2), "a-1").attend() == 2
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


def test_events_for_collectors_are_printed_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    events = [
        {"level": "info", "message": "step 3/9", "run": "a"},
        {"level": "warning", "message": "low", "run": None},
        {"level": "error", "message": "too small", "run": "a"},
    ]
    others = [
        "{not JSON",
        '{"level": 1}',
        '{"level": "info", "message": 1}',
        '{"level": [], "message": "x"}',
        "the rest",
    ]
    lines = [*map(json.dumps, events), "error: too small", *others]
    assert Watch(Server((None, None), log="\n".join(lines)), "a-1").attend() == 0
    told = ["[a] step 3/9", "warning: low", "error: too small", *others]
    assert capsys.readouterr().out == "\n".join(told)


class Gone(Server):
    """A cluster that went away."""

    def get_job_info(self, job: str) -> JobDetails:
        """See JobSubmissionClient."""
        raise ConnectionError("refused")


def test_a_cluster_that_went_away_ends_the_wait() -> None:
    with pytest.raises(TrainingError, match=r"does not answer any more \(refused\); job a-1 may go on"):
        Watch(Gone(*[(0, OSError())] * 9), "a-1").attend()


class Terminal(io.StringIO):
    """Standard input at which somebody sits."""

    def isatty(self) -> bool:
        """See TextIO."""
        return True


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A process that a shell has put into the background ignores Ctrl-C, and so would the job's follower."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    ("stdin", "interrupts", "stopped", "code"),
    [
        (Terminal("y\n"), 1, 1, 1),
        (Terminal("n\n"), 1, 0, LEFT),
        (Terminal(""), 1, 0, LEFT),
        (Terminal("y\n"), 2, 1, LEFT),
        (io.StringIO("y\n"), 1, 0, LEFT),
    ],
)
def test_ctrl_c_asks_whether_to_stop(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stdin: io.StringIO,
    interrupts: int,
    stopped: int,
    code: int,
) -> None:
    monkeypatch.setattr(sys, "stdin", stdin)
    server = Server(*[(4, KeyboardInterrupt())] * interrupts, (None, None), code=1)
    assert Watch(server, "a-1").attend() == code
    assert server.stopped == stopped
    out = capsys.readouterr().out
    assert ("`ray job stop a-1` stops it" in out) == (code == LEFT)
    assert out.count("one\n") == 1


@pytest.mark.parametrize(
    ("job", "code", "said"),
    [
        (details("SUCCEEDED", 0), 0, ""),
        (details("FAILED", 1, "its log says why"), 1, ""),
        (details("FAILED", 2), 2, ""),
        (details("FAILED", -9), 137, "killed by SIGKILL: the same command continues"),
        (details("FAILED", 137), 137, "killed by SIGKILL"),
        (details("STOPPED"), 1, "was stopped: the same command continues"),
    ],
)
def test_the_exit_code_is_the_jobs(capsys: pytest.CaptureFixture[str], job: JobDetails, code: int, said: str) -> None:
    assert exit_code(job) == code
    out = capsys.readouterr().out
    assert said in out and bool(out) == bool(said)


def test_a_job_that_never_ran_says_why() -> None:
    with pytest.raises(TrainingError, match=r"job a-1 did not run to an end: no room$"):
        exit_code(details("FAILED", None, "no room\ntrace"))
