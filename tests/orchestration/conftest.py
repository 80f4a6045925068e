"""One real Ray cluster for all of these tests, and the console in processes of its own."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import ray
from ray.util.placement_group import placement_group, remove_placement_group

from ray_dwm.config import RunConfig, to_yaml
from ray_dwm.orchestration.cluster import NAMESPACE

# Of all drivers, in this process and in others.
os.environ |= {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",  # how soon it sees that workers have ended, or died
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process for each run, where no node announces its end
    "RAY_metrics_report_interval_ms": "1000",  # not 10 s: a test's run is over by then
}

ROOT = Path(__file__).resolve().parents[2]
RAY = Path(sys.executable).with_name("ray")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment variables that point at a running cluster of 8 logical CPUs, with a dashboard for jobs."""
    port, dashboard, folder = _free_port(), _free_port(), tmp_path_factory.mktemp("ray", numbered=True)
    command = [str(RAY), "start", "--head", f"--port={port}", "--num-cpus=8", "--num-gpus=0", "--disable-usage-stats"]
    command += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={_free_port()}", "--block"]
    client, metrics = _free_port(), _free_port()
    command += ["--object-store-memory=300000000", f"--ray-client-server-port={client}"]
    command += [f"--metrics-export-port={metrics}"]
    command += ["--include-log-monitor=false", "--no-monitor"]  # nobody reads along, and no node is to be added
    environment = {
        **os.environ,
        "PATH": f"{RAY.parent}:{os.environ['PATH']}",
        "RAY_ADDRESS": f"127.0.0.1:{port}",
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "CLIENT_ADDRESS": f"ray://127.0.0.1:{client}",
        "METRICS_URL": f"http://127.0.0.1:{metrics}/metrics",
        "RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S": "180",  # a client's server starts, on a machine that may be slow
        "GRPC_ENABLE_FORK_SUPPORT": "0",  # else one in ten of them dies as it is forked
        "RAY_CLIENT_MAX_CONNECTION_TIMEOUT_S": "180",
    }
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    try:
        wait_for(lambda: "--block" in (folder / "head.log").read_text(), "the Ray head")
        yield environment
    finally:
        # All at once: the head's blocking command lives on when only it is asked to end.
        for process in [*psutil.Process(head.pid).children(recursive=True), head]:
            with suppress(psutil.NoSuchProcess):  # it may have ended by itself
                process.kill()
        head.wait(PATIENCE_S)


@pytest.fixture(scope="session")
def driver(cluster: dict[str, str]) -> Iterator[None]:
    """This process as a driver of the cluster, once for all tests: every driver has workers of its own started."""
    ray.init(address=cluster["RAY_ADDRESS"], namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


CTRL_C = signal.getsignal(signal.SIGINT)


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """Ray Train takes Ctrl-C for itself, and keeps it: whoever runs the tests wants it back."""
    yield
    signal.signal(signal.SIGINT, CTRL_C)


@contextmanager
def held(cpus: int) -> Iterator[None]:
    """A while in which others hold some of the cluster's CPUs; this process is a driver of it."""
    group = placement_group([{"CPU": cpus}])
    try:
        assert group.wait(PATIENCE_S)
        yield
    finally:
        remove_placement_group(group)


PATIENCE_S = 400.0
"""How long anything is waited for: a machine may be many times slower than another, and a test is no stopwatch."""


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come within {PATIENCE_S:g} s"
        time.sleep(0.1)  # looking through all processes is work, too


def run_job(environment: dict[str, str], script: str, *arguments: str) -> str:
    """What `ray job submit` prints of a script in jobs/, which must succeed."""
    command = [str(RAY), "job", "submit", "--working-dir", ".", "--", "python", f"jobs/{script}.py", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=2 * PATIENCE_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Scraper:
    """A context in which the head's metrics are read all the time, as Prometheus would."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._url, self._ended = environment["METRICS_URL"], threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self.samples: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
        """Name -> labels -> the last value that was seen."""
        self.seen: dict[str, float] = {}
        """Name -> when any of its series was seen last."""

    def __enter__(self) -> Scraper:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def of(self, name: str, run: str) -> list[dict[str, str]]:
        """The labels of a run's series of this name."""
        found = (dict(labels) for labels in self.samples.get(name, {}))
        return [labels for labels in found if labels.get("ray_train_run_name") == run]

    def _read(self) -> None:
        while not self._ended.wait(0.5):
            with suppress(OSError), urllib.request.urlopen(self._url, timeout=5) as answer:
                for line in answer.read().decode().splitlines():
                    if match := re.fullmatch(r"(ray_\w+)(?:\{(.*)\})? (\S+)", line):
                        labels = tuple(re.findall(r'(\w+)="([^"]*)"', match[2] or ""))
                        self.samples.setdefault(match[1], {})[labels] = float(match[3])
                        self.seen[match[1]] = time.time()


def _is_gcs(argument: str, port: str) -> bool:
    return argument.startswith("--gcs-address=") and argument.endswith(f":{port}")


def _parent(process: psutil.Process) -> list[str]:
    """The command line of what has started a process: of a worker, its node's raylet."""
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(process.ppid()).cmdline()
    return []


class Console:
    """`ray-dwm` in a process of its own."""

    def __init__(self, environment: dict[str, str], folder: Path) -> None:
        self.environment, self.folder = environment, folder

    def start(self, config: RunConfig, command: str = "train") -> subprocess.Popen[str]:
        """Start a command on a configuration; its output goes to console.log."""
        file = self.folder / f"{config.name}.yaml"
        file.write_text(to_yaml(config))
        with (self.folder / f"{config.name}.log").open("w") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "ray_dwm.cli", command, "--config", str(file)],
                stdout=log,
                stderr=subprocess.STDOUT,
                text=True,
                env=self.environment,
                cwd=ROOT,
            )

    def processes(self, title: str) -> list[psutil.Process]:
        """Processes of its cluster whose title names a class."""
        found = [p for p in psutil.process_iter(["cmdline"]) if title in " ".join(p.info["cmdline"] or [])]
        port = self.environment["RAY_ADDRESS"].rsplit(":", 1)[1]  # the head may be known by another name
        return [p for p in found if any(_is_gcs(argument, port) for argument in _parent(p))]

    def output(self, config: RunConfig) -> str:
        """What the command has printed."""
        return (self.folder / f"{config.name}.log").read_text()

    def finish(self, config: RunConfig, process: subprocess.Popen[str], code: int = 0) -> str:
        """Wait for the end and check the exit code."""
        process.wait(PATIENCE_S)
        assert process.returncode == code, self.output(config)
        return self.output(config)


@pytest.fixture
def console(cluster: dict[str, str], tmp_path: Path) -> Console:
    """The console on the cluster."""
    return Console(cluster, tmp_path)
