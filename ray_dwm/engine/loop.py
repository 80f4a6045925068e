"""The training loop: read this file first.

A run is: build everything from the configuration, restore the newest checkpoint, then per step
read a global batch -> weigh it -> take the LM's step -> every N steps feed the upper level -> log -> evaluate
-> checkpoint. `fit` below is that sentence as code.
"""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack
from typing import NamedTuple

import torch

from ray_dwm.data.plan import Cursor
from ray_dwm.data.shards import Rows
from ray_dwm.engine.batch import Batch, to_batch
from ray_dwm.engine.checkpoint import Checkpointer
from ray_dwm.engine.clock import Clock
from ray_dwm.engine.evaluate import mean_loss, spread_rows, stream
from ray_dwm.engine.mesh import all_sum, is_main
from ray_dwm.engine.parts import Parts
from ray_dwm.engine.profiling import StepProfiler
from ray_dwm.engine.recorder import Recorder
from ray_dwm.engine.saved import step_of
from ray_dwm.engine.state import TrainingState
from ray_dwm.engine.step import StepResult
from ray_dwm.engine.stopping import NOTICE_INTERVAL_S, on_sigterm
from ray_dwm.engine.upper import UpperLevel
from ray_dwm.errors import Stopped


class _Agreed(NamedTuple):
    """What all ranks know after a step: sums over them."""

    loss: float
    writing: bool
    """A rank has not finished its part of the checkpoint that is being written."""
    stop: bool
    look: bool
    """It is time to look whether a node is about to be taken away."""


class Trainer:
    """Runs the loop of one attempt."""

    def __init__(self, parts: Parts) -> None:
        self._parts, self._config = parts, parts.config
        self._lower, self._weighting, self._weigher = parts.lower, parts.weighting, parts.weigher
        self._upper = None
        if parts.weigher is not None:
            self._upper = UpperLevel(
                parts.config, parts.lower, parts.weigher, parts.targets, parts.seq_len, parts.device
            )
        state = TrainingState(parts.lower, parts.weighting, self._upper)
        self._checkpointer = Checkpointer(parts.config, state, parts.identity, parts.mesh)
        self._saved: dict[str, float] = {}
        self._terminated = threading.Event()
        self._next_look = 0.0
        self._clock, self._profiler = Clock(), StepProfiler(parts.config)
        self._main = is_main()

    def fit(self) -> dict[str, float]:
        """Train from the newest checkpoint to the last step, or `until`; returns the last figures.

        Raises:
            Stopped: a rank was asked to end; the checkpoint of the last step, if one was taken, is whole.
        """
        self._recorder = Recorder(self._parts, self._clock, self._upper)
        with ExitStack() as ending:  # all of them end, also where one of them fails to
            ending.push(self._recorder.end)
            ending.callback(self._checkpointer.close)
            ending.callback(self._profiler.close)
            step, cursor = self._checkpointer.load_latest()
            self._recorder.open(step)
            ending.enter_context(on_sigterm(self._terminated.set))
            return self._steps(step, cursor)

    def _steps(self, step: int, cursor: Cursor) -> dict[str, float]:
        config, last = self._config, self._config.train.steps
        end = self._parts.until or last
        figures: dict[str, float] = {}
        stop = torch.tensor(float(self._asked_to_stop()), device=self._parts.device)
        if step < last and all_sum(stop) > 0:
            raise Stopped(f"[{config.name}] stopped at step {step}, before the next: the same command continues")
        if step == 0:
            figures = self._recorder.log({"step": 0, "tokens": 0, **self.evaluate(config.train.eval_sequences)})
        batches = map(self._batch, self._parts.source.stream(cursor.batches, end))
        upcoming: Batch | None = None
        while step < end:
            self._profiler.before(step)
            with self._clock.phase("data"):
                batch = upcoming or next(batches)
                cursor = Cursor(cursor.batches + 1)
                upcoming = next(batches, None) if config.dwm.look_ahead else None
            result = self._train_step(step, batch, upcoming)
            step += 1
            with self._clock.phase("log"):
                agreed = self._agree(result)
                figures = self._recorder.figures(step, batch, result, agreed.loss)
                figures |= self._parts.figures.get(step, {})
            if step % config.train.eval_every == 0 or step == last:
                figures |= self.evaluate(config.train.eval_sequences)
            figures = self._recorder.log(figures)
            self._record_version(step)
            if not agreed.writing:
                self._tell_checkpoint()
            at_once = agreed.stop or (agreed.look and self._preempted())
            if step % config.checkpoint.every == 0 or step == end or at_once:
                self._checkpoint(step, cursor, figures)
            if at_once:
                self._tell_checkpoint()
            if agreed.stop and step < last:
                raise Stopped(f"[{config.name}] stopped at step {step}: checkpoint saved, the same command continues")
        self._tell_checkpoint()
        return figures

    def _agree(self, result: StepResult) -> _Agreed:
        """One sum over the ranks for all that they have to tell each other at the end of a step."""
        stop = self._asked_to_stop()
        look = self._main and self._parts.preempted is not None and time.monotonic() >= self._next_look
        if look:
            self._next_look = time.monotonic() + NOTICE_INTERVAL_S
        flags = torch.tensor([self._checkpointer.writing, stop, look], dtype=torch.float64, device=self._parts.device)
        loss, *told = all_sum(torch.cat([result.losses_b.double().sum()[None], flags])).tolist()
        return _Agreed(loss, *(number > 0 for number in told))

    def _asked_to_stop(self) -> bool:
        return self._terminated.is_set() or self._parts.should_stop()

    def _preempted(self) -> bool:
        return self._parts.preempted is not None and self._parts.preempted()

    def _batch(self, rows: Rows) -> Batch:
        return to_batch(rows, self._config.train.global_batch, self._parts.seq_len, self._parts.device)

    def _train_step(self, step: int, batch: Batch, upcoming: Batch | None) -> StepResult:
        """One LM step and, where it is due, the bi-level step around it; `upcoming` is weighed beside it."""
        clock, upper = self._clock, self._upper
        if self._weighting is not None:
            with clock.phase("dwm_wait"):
                self._weighting.advance(step)
        if self._weigher is not None and upcoming is not None:
            with clock.phase("weigh"):
                self._weigher.prepare(batch.input_ids, upcoming.input_ids)
        due = upper is not None and upper.due(step)
        clock.exact = due
        if upper is not None and due:
            with clock.phase("bilevel"):
                upper.begin(step, batch)
        with clock.phase("step"):
            result = self._lower.step(step, batch, self._weighting)
        if upper is not None and due:
            clock.move("step", "bilevel", upper.watch_seconds)
            with clock.phase("bilevel"):
                upper.finish(step, batch, result)
        self._lower.zero_grad()
        return result

    def evaluate(self, sequences: int | None = None) -> dict[str, float]:
        """Losses over `sequences` rows of every evaluation set, or over all of them; collective."""
        parts, micro = self._parts, self._config.train.micro_batch
        losses = {}
        for name, reader in parts.evaluation.items():
            rows = spread_rows(reader, sequences or reader.manifest.rows)
            batches = stream(reader, rows, micro, parts.seq_len, parts.device)
            losses[f"val/{name}/loss"] = mean_loss(self._lower.model, batches)
        return losses

    def _record_version(self, step: int) -> None:
        points, steps = self._config.dwm.trajectory_points, self._config.train.steps
        if self._parts.on_version is not None and step * points // steps > (step - 1) * points // steps:
            self._parts.on_version(step)

    def _checkpoint(self, step: int, cursor: Cursor, figures: dict[str, float]) -> None:
        self._tell_checkpoint()
        self._recorder.flush(step)
        with self._recorder.held_up.passage():
            self._checkpointer.save(step, cursor)
        self._saved = figures

    def _tell_checkpoint(self) -> None:
        """Wait for the checkpoint that is being written, if there is one, and tell that it is whole."""
        if not self._checkpointer.pending:
            return
        with self._recorder.held_up.passage():
            path = self._checkpointer.wait()
        if path is not None and self._parts.on_checkpoint is not None:
            self._parts.on_checkpoint(step_of(path), path, self._saved)
