"""Several cells of an experiment at once: a driver process for each, as long as the cluster has room for all of them.

A cell is started only where what it asks for fits beside what the others hold, counted here. So no two of them wait
for each other's workers, and one at least goes on whatever the cluster's size.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping

import ray

from ray_dwm.analysis.grid import EXPERIMENT, record_path
from ray_dwm.config.experiment import Cell, ExperimentConfig, needed
from ray_dwm.engine.stopping import on_sigterm
from ray_dwm.errors import Stopped
from ray_dwm.logs import say
from ray_dwm.orchestration.cells import begin, fail, has_failed, is_done

_POLL_S = 0.5


class Pool:
    """Runs cells, and keeps count of what they hold of the cluster, which this process has joined."""

    def __init__(
        self, config: ExperimentConfig, asked: Mapping[Cell, Mapping[str, float]], most: int, device: str
    ) -> None:
        """Takes cells in their order, with what each asks of the cluster, and at most so many at once."""
        self._config, self._asked, self._most, self._device = config, asked, most, device
        self._waiting = list(asked)
        self._running: dict[Cell, subprocess.Popen[bytes]] = {}
        self._failed: list[Cell] = []
        self._stopping = False

    def run(self) -> list[Cell]:
        """Run all of them to their ends; those that have failed are returned.

        Raises:
            Stopped: a SIGTERM came, and the cells have saved checkpoints.
        """
        room: dict[str, float] = ray.cluster_resources() if self._waiting else {}
        with on_sigterm(self._stop):
            try:
                while self._running or (self._waiting and not self._stopping):
                    if not self._stopping:
                        self._give_up()
                        while (cell := self._startable(room)) is not None:
                            self._start(cell)
                    time.sleep(_POLL_S)
                    self._collect()
            except KeyboardInterrupt:
                self._stop()
                for process in self._running.values():
                    process.wait()
                raise
            finally:
                for process in self._running.values():
                    process.kill()
        if self._stopping:
            raise Stopped(f"experiment {self._config.name} stopped: the same command continues")
        return self._failed

    def _stop(self) -> None:
        self._stopping = True
        for process in self._running.values():
            process.send_signal(signal.SIGTERM)

    def _give_up(self) -> None:
        """Take out cells that need one that has failed."""
        for cell in list(self._waiting):
            lacking = [other.path for other in needed(self._config, cell).values() if other in self._failed]
            if lacking:
                fail(self._config, cell, f"it needs {', '.join(lacking)}, which failed")
                self._waiting.remove(cell)
                self._failed.append(cell)

    def _startable(self, room: Mapping[str, float]) -> Cell | None:
        """A cell that can be started now; where none runs any will do, because each fits alone."""
        if len(self._running) >= self._most:
            return None
        for cell in self._waiting:
            held = [self._asked[other] for other in self._running]
            asked = self._asked[cell].items()
            fits = all(sum(one.get(kind, 0.0) for one in held) + n <= room.get(kind, 0.0) for kind, n in asked)
            ready = all(is_done(self._config, other) for other in needed(self._config, cell).values())
            if ready and (fits or not held):
                return cell
        return None

    def _start(self, cell: Cell) -> None:
        begin(self._config, cell, self._device, self._most)
        log = record_path(self._config.folder, cell).with_suffix(".log")
        say(f"{cell.path} begins: {log}")
        file = str(self._config.folder / EXPERIMENT)
        with log.open("ab") as stream:
            self._running[cell] = subprocess.Popen(
                [sys.executable, "-m", "ray_dwm.cli", "experiment", file, "--cell", cell.path],
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
                start_new_session=True,  # a Ctrl-C is passed on once, by us
            )
        self._waiting.remove(cell)

    def _collect(self) -> None:
        """Take out cells that have ended."""
        for cell, process in list(self._running.items()):
            if process.poll() is None:
                continue
            del self._running[cell]
            if is_done(self._config, cell):
                say(f"{cell.path} is done")
            elif not self._stopping:
                if not has_failed(self._config, cell):
                    fail(self._config, cell, f"its driver ended with code {process.returncode}, see its log")
                self._failed.append(cell)
