"""What a pod does before it goes: `python -m ray_dwm.orchestration.leaving head|worker --seconds=120`, as preStop hook.

Kubernetes runs the hook, and sends the pod's processes a SIGTERM when it has ended, and a SIGKILL when the pod's
terminationGracePeriodSeconds are over. On the head the jobs' drivers are asked to save a checkpoint and end. On a
worker Ray is told that the node is about to be taken away, so that the run saves a checkpoint at its next step. Either
way the hook ends when nobody is left who has something to save. Nothing here imports torch: there may be little time.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

PROCESSES = Path("/proc")
_DRIVER = b"RAY_JOB_CONFIG_JSON_ENV_VAR="  # in the environment of a Ray job's driver and of what it starts
_WORKER = b"ray::RayTrainWorker"
_POLL_S = 0.5
_DRAIN_TIMEOUT_S = 30
_TOLD_S = 20.0
"""How long the head stays after its drivers' end: KubeRay asks it every few seconds how a job has ended, and what has
failed, but not what cannot be asked any more, it tries again."""


def drivers(processes: Path) -> list[int]:
    """Processes of Ray jobs' drivers in this container; those that they started are told by them."""
    found = {
        int(process.name)
        for process in _each(processes)
        if b"\0" + _DRIVER in b"\0" + _read(process / "environ") and _read(process / "comm").startswith(b"python")
    }
    return sorted(pid for pid in found if _parent(pid) not in found)


def workers(processes: Path) -> list[int]:
    """Processes of Ray Train's workers in this container."""
    return sorted(int(process.name) for process in _each(processes) if _read(process / "cmdline").startswith(_WORKER))


def leave_head(seconds: float, processes: Path) -> bool:
    """Ask the jobs' drivers to end, once, and wait for them; whether all have ended is returned."""
    deadline = time.monotonic() + seconds
    asked = drivers(processes)
    for pid in asked:
        with suppress(ProcessLookupError):
            os.kill(
                pid, signal.SIGTERM
            )  # not by `ray job stop`: for KubeRay a stopped job is done, a failed one is not
    ended = _wait(lambda: drivers(processes), seconds)
    if asked and ended:
        time.sleep(max(0.0, min(_TOLD_S, deadline - time.monotonic())))
    return ended


def leave_worker(seconds: float, processes: Path) -> bool:
    """Announce this node's end, and wait for the training on it to end; whether it has ended is returned."""
    if not workers(processes):
        return True
    deadline = time.monotonic() + seconds
    with suppress(subprocess.TimeoutExpired):  # as where the head has gone before
        subprocess.run(drain_command(seconds), timeout=min(seconds, _DRAIN_TIMEOUT_S), check=False)
    return _wait(lambda: workers(processes), deadline - time.monotonic())


def drain_command(seconds: float) -> list[str]:
    """Ray's command that announces the end of the node that it runs on."""
    reason = ["--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=the pod is being deleted"]
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    return [*ray, "drain-node", *reason, f"--deadline-remaining-seconds={int(seconds)}"]


def _wait(remaining: Callable[[], list[int]], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while remaining():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_S)
    return True


def _each(processes: Path) -> Iterator[Path]:
    return processes.glob("[0-9]*")


def _read(path: Path) -> bytes:
    with suppress(OSError):  # it has ended, or is another user's
        return path.read_bytes()
    return b""


def _parent(pid: int) -> int:
    fields = _read(Path(f"/proc/{pid}/stat")).rpartition(b")")[2].split()
    return int(fields[1]) if fields else 0


def main() -> None:
    """The hook; its exit code changes nothing, what it prints goes to the pod's events if it fails."""
    parser = argparse.ArgumentParser(description="What a pod does before it goes.")
    parser.add_argument("pod", choices=["head", "worker"])
    parser.add_argument("--seconds", type=float, required=True, help="How long it may take.")
    options = parser.parse_args()
    leave = leave_head if options.pod == "head" else leave_worker
    if not leave(options.seconds, PROCESSES):
        sys.exit(f"{options.pod}: not over after {options.seconds:g} s")


if __name__ == "__main__":
    main()
