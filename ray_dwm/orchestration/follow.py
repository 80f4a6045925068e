"""A Ray job that is being watched: its log as it comes, what Ctrl-C means, and the exit code that it ends with."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from contextlib import suppress

import aiohttp
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from ray_dwm.errors import TrainingError, first_line
from ray_dwm.logs import readable

LEFT = 130
"""Exit code where the user leaves a job that goes on: a shell's for Ctrl-C."""
_TRIES = 6
_PAUSE_S = 5.0
_SILENCE_S = 60.0
"""After which the job is asked after: a connection may be lost without a word."""
_LOST = (RuntimeError, OSError, aiohttp.ClientError)


class Watch:
    """One job's log on standard output. A broken connection is taken up where it broke."""

    def __init__(self, client: JobSubmissionClient, submission_id: str) -> None:
        self._client, self._id = client, submission_id
        self._printed = 0
        """Characters of the log."""
        self._rest, self._last = "", ""
        """An incomplete line, and the last whole one."""

    def attend(self) -> int:
        """Follow the job to its end; Ctrl-C asks whether to stop it.

        Returns:
            The job's exit code, or LEFT.

        Raises:
            TrainingError: the cluster does not answer any more, or the job never ran.
        """
        stopping = False
        while True:
            try:
                return exit_code(self._follow())
            except KeyboardInterrupt:
                if stopping or not _wants_stop():
                    self._say(f"goes on: the same command follows it again, `ray job stop {self._id}` stops it")
                    return LEFT
            stopping = True
            try:
                self._client.stop_job(self._id)
                self._say("is asked to stop; a run saves a checkpoint first. Ctrl-C leaves it to itself")
            except _LOST as error:
                self._say(f"cannot be asked to stop ({first_line(error)}): `ray job stop {self._id}` does it later")

    def _follow(self) -> JobDetails:
        failures = 0
        while True:
            with suppress(*_LOST):
                asyncio.run(self._tail())
            try:
                job = self._client.get_job_info(self._id)  # before the log: what is over says nothing more
                self._print(self._client.get_job_logs(self._id), 0)  # also where a proxy lets no web socket through
                failures = 0
                if job.status.is_terminal():
                    print(self._rest, end="", flush=True)
                    return job
            except _LOST as error:
                failures += 1
                if failures == _TRIES:
                    raise TrainingError(
                        f"the cluster does not answer any more ({first_line(error)}); job {self._id} may go on: the "
                        "same command follows it, or starts its next attempt"
                    ) from None
            time.sleep(_PAUSE_S)

    async def _tail(self) -> None:
        """Ray sends the log from its start."""
        place, log = 0, aiter(self._client.tail_job_logs(self._id))
        with suppress(StopAsyncIteration):
            while True:
                lines = await asyncio.wait_for(anext(log), _SILENCE_S)
                self._print(lines, place)
                place += len(lines)

    def _print(self, text: str, place: int) -> None:
        """What of a part of the log, which begins at a place, was not printed before."""
        new = text[max(0, self._printed - place) :]
        if not new:
            return
        self._printed = place + len(text)
        *lines, self._rest = (self._rest + new).split("\n")
        for line in map(readable, lines):
            if line != self._last or not line.startswith("error: "):  # as JSON for collectors, and as text
                print(line, flush=True)
            self._last = line

    def _say(self, text: str) -> None:
        print(f"[{self._id}] {text}", flush=True)


def _wants_stop() -> bool:
    """Ask at a terminal; elsewhere the job is left alone."""
    if not sys.stdin.isatty():
        return False
    try:
        return input("\nstop the job? [y/N] ").strip().lower() in ("y", "yes")
    except (EOFError, KeyboardInterrupt):
        return False


def exit_code(job: JobDetails) -> int:
    """The code of a job that has ended; what its own log does not say is said here.

    Raises:
        TrainingError: it never ran.
    """
    if job.status == JobStatus.SUCCEEDED:
        return 0
    code, message = job.driver_exit_code, (job.message or "").strip().splitlines()
    if job.status == JobStatus.STOPPED:
        print(f"[{job.submission_id}] was stopped: the same command continues", flush=True)
        return 1
    if code is None:
        reason = message[0] if message else "Ray does not say why"
        raise TrainingError(f"job {job.submission_id} did not run to an end: {reason}")
    killed_by = -code if code < 0 else code - 128  # the latter is what a shell says of what it ran
    if killed_by in set(signal.Signals):
        name = signal.Signals(killed_by).name
        print(f"[{job.submission_id}] was killed by {name}: the same command continues", flush=True)
        return 128 + killed_by
    return code
