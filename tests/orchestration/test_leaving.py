"""A pod's preStop hook, on processes that look like those of a pod."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from orchestration.conftest import PATIENCE_S, wait_for
from ray.scripts.scripts import drain_node

from ray_dwm.orchestration import leaving

SLEEP = "import time; time.sleep(60)"
PARENT = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {SLEEP!r}]); time.sleep(60)"
WAITS = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"


class Pod:
    """A folder in place of /proc, with some processes only: this machine may run other jobs."""

    def __init__(self, proc: Path, stack: ExitStack) -> None:
        self.proc, self._stack = proc, stack

    def start(self, *command: str, job: bool = False, executable: str | None = None) -> subprocess.Popen[str]:
        """Start a process in it, as a job's driver or not."""
        variables = {"RAY_JOB_CONFIG_JSON_ENV_VAR": "{}"} if job else {}
        environment = {**os.environ, **variables}
        process = subprocess.Popen(
            command, executable=executable, env=environment, text=True, stdout=subprocess.PIPE, start_new_session=True
        )
        self._stack.callback(process.wait)
        self._stack.callback(self._end, process.pid)
        self.add(process.pid)
        return process

    @staticmethod
    def _end(session: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(session, signal.SIGKILL)

    def add(self, pid: int) -> None:
        """Let a process be seen."""
        (self.proc / str(pid)).symlink_to(f"/proc/{pid}")


@pytest.fixture
def pod(tmp_path: Path) -> Iterator[Pod]:
    """A pod; its processes end with the test."""
    with ExitStack() as stack:
        yield Pod(tmp_path, stack)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks often."""
    monkeypatch.setattr(leaving, "_POLL_S", 0.05)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_drivers_are_told_once_and_waited_for(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = pod.start(sys.executable, "-c", PARENT, job=True)
    other = pod.start(sys.executable, "-c", SLEEP)
    wait_for(lambda: children(driver.pid), "the driver's child")
    pod.add(children(driver.pid)[0])
    wait_for(lambda: leaving.drivers(pod.proc), "the driver")
    assert leaving.drivers(pod.proc) == [driver.pid]  # not its child, which it tells itself
    [child] = children(driver.pid)
    assert not leaving.leave_head(0.0, pod.proc)  # the child is left, now without a parent among them
    assert driver.wait(PATIENCE_S) == -signal.SIGTERM
    assert leaving.drivers(pod.proc) == [child]
    monkeypatch.setattr(leaving, "_TOLD_S", 1.0)
    began = time.monotonic()
    assert leaving.leave_head(30, pod.proc)
    assert 1 <= time.monotonic() - began < 20  # it stays a little, to be asked how they ended
    assert other.poll() is None


def test_a_head_without_drivers_goes_at_once(pod: Pod) -> None:
    pod.start(sys.executable, "-c", SLEEP)
    began = time.monotonic()
    assert leaving.leave_head(30, pod.proc)
    assert time.monotonic() - began < 5


def test_a_driver_that_takes_too_long_is_given_up(pod: Pod) -> None:
    driver = pod.start(sys.executable, "-c", WAITS, job=True)
    assert driver.stdout and driver.stdout.readline()
    assert not leaving.leave_head(0.1, pod.proc)
    assert driver.poll() is None


def test_a_node_is_drained_only_where_workers_train(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    drained = pod.proc / "drained"
    monkeypatch.setattr(leaving, "drain_command", lambda seconds: ["sh", "-c", f"echo {seconds} >> {drained}"])
    assert leaving.leave_worker(30, pod.proc) and not drained.exists()
    worker = pod.start("ray::RayTrainWorker.run_train_fn", "60", executable="/bin/sleep")
    pod.start("ray::IDLE", "60", executable="/bin/sleep")
    wait_for(lambda: leaving.workers(pod.proc), "the worker")
    assert leaving.workers(pod.proc) == [worker.pid]
    assert not leaving.leave_worker(0.2, pod.proc) and drained.read_text() == "0.2\n"
    worker.kill()
    worker.wait()
    assert leaving.leave_worker(30, pod.proc) and drained.read_text() == "0.2\n"


def test_an_unreachable_head_does_not_hold_the_pod(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    pod.start("ray::RayTrainWorker.run_train_fn", "60", executable="/bin/sleep")
    wait_for(lambda: leaving.workers(pod.proc), "the worker")
    monkeypatch.setattr(leaving, "drain_command", lambda seconds: ["sleep", "60"])
    began = time.monotonic()
    assert not leaving.leave_worker(0.5, pod.proc)
    assert time.monotonic() - began < 10


def test_ray_knows_the_command() -> None:
    *_, command, reason, message, seconds = leaving.drain_command(119.5)
    assert command == drain_node.name == "drain-node"
    context = drain_node.make_context(command, [reason, message, seconds])
    assert context.params["deadline_remaining_seconds"] == 119 and context.params["node_id"] is None


@pytest.mark.parametrize("arguments", [["pod"], ["head"], ["worker", "--seconds=soon"]])
def test_a_wrong_hook_says_so(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["leaving", *arguments])
    with pytest.raises(SystemExit) as ended:
        leaving.main()
    assert ended.value.code == 2
