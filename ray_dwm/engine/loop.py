"""The training loop: read this file first.

A run is: build everything from the configuration, restore the newest checkpoint, then per step
read a global batch -> weigh it -> take the LM's step -> every N steps feed the upper level -> log -> evaluate
-> checkpoint. `fit` below is that sentence as code.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ray_dwm.config import RunConfig
from ray_dwm.core.weighting import effective_sample_size, normalised_entropy
from ray_dwm.data.plan import Cursor
from ray_dwm.data.records import read_metrics
from ray_dwm.data.shards import Rows, ShardReader
from ray_dwm.engine.batch import Batch, BatchSource, to_batch
from ray_dwm.engine.checkpoint import Checkpointer, step_of
from ray_dwm.engine.clock import Clock, overhead
from ray_dwm.engine.evaluate import mean_loss, spread_rows, stream
from ray_dwm.engine.mesh import all_gather_rows, all_sum
from ray_dwm.engine.metrics import JsonlSink, MetricSink, WeightsWriter
from ray_dwm.engine.profiling import StepProfiler
from ray_dwm.engine.state import TrainingState
from ray_dwm.engine.step import LowerLevel, StepResult
from ray_dwm.engine.stopping import NOTICE_INTERVAL_S, on_sigterm
from ray_dwm.engine.upper import UpperLevel
from ray_dwm.engine.weigher import Weigher
from ray_dwm.engine.weighting import Weighting
from ray_dwm.errors import Stopped, TrainingError


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a run is put together from; `setup.build` makes it."""

    config: RunConfig
    device: torch.device
    seq_len: int
    lower: LowerLevel
    source: BatchSource
    targets: dict[str, ShardReader]
    """Name of a target set -> its shards."""
    evaluation: dict[str, ShardReader]
    """Name of an evaluation set -> its shards."""
    domains: list[str]
    weighting: Weighting | None
    """None: uniform weights."""
    identity: Mapping[str, Any]
    """What a checkpoint must be of to be continued; see `engine/identity.py`."""
    mesh: Mapping[str, int]
    """Name of every dimension of the mesh -> its size."""
    sinks: list[MetricSink] = field(default_factory=list)
    """Besides metrics.jsonl; used on rank 0."""
    on_checkpoint: Callable[[int, Path, dict[str, float]], None] | None = None
    """Called on all ranks when a checkpoint is whole: (step, folder, the step's figures)."""
    on_version: Callable[[int], None] | None = None
    """Called on all ranks at the points of the trajectory, after so many steps."""
    should_stop: Callable[[], bool] = lambda: False
    """Asked at every step on every rank: where one says yes, all save a checkpoint and end, as after a SIGTERM."""
    preempted: Callable[[], bool] | None = None
    """Asked from time to time on all ranks together, which get the same answer: yes saves a checkpoint at once."""

    @property
    def weigher(self) -> Weigher | None:
        """The weighting where it is a DWM."""
        return self.weighting if isinstance(self.weighting, Weigher) else None


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
        self._main = dist.get_rank() == 0
        self._alarmed = False

    def fit(self) -> dict[str, float]:
        """Train from the newest checkpoint to the last step; returns the last figures.

        Raises:
            Stopped: a rank was asked to end; the checkpoint of the last step is whole.
        """
        step, cursor = self._checkpointer.load_latest()
        self._open_logs(step)
        exit_code = 1
        try:
            with on_sigterm(self._terminated.set):
                figures = self._steps(step, cursor)
            exit_code = 0
            return figures
        finally:
            self._profiler.close()
            self._checkpointer.close()
            for sink in self._sinks:
                sink.close(exit_code)

    def _steps(self, step: int, cursor: Cursor) -> dict[str, float]:
        config, last = self._config, self._config.train.steps
        figures: dict[str, float] = {}
        if step == 0:
            figures = self._log({"step": 0, "tokens": 0, **self.evaluate(config.train.eval_sequences)})
        batches = map(self._batch, self._parts.source.stream(cursor.batches, last))
        upcoming: Batch | None = None
        while step < last:
            self._profiler.before(step)
            with self._clock.phase("data"):
                batch = upcoming or next(batches)
                cursor = Cursor(cursor.batches + 1)
                upcoming = next(batches, None) if config.dwm.look_ahead else None
            result = self._train_step(step, batch, upcoming)
            step += 1
            with self._clock.phase("log"):
                agreed = self._agree(result)
                figures = self._figures(step, batch, result, agreed.loss)
            if step % config.train.eval_every == 0 or step == last:
                figures |= self.evaluate(config.train.eval_sequences)
            figures = self._log(figures)
            self._record_version(step)
            if not agreed.writing:
                self._tell_checkpoint()
            at_once = agreed.stop or (agreed.look and self._preempted())
            if step % config.checkpoint.every == 0 or step == last or at_once:
                self._checkpoint(step, cursor, figures)
            if at_once:
                self._tell_checkpoint()
            if agreed.stop and step < last:
                raise Stopped(f"[{config.name}] stopped at step {step}: checkpoint saved, the same command continues")
        self._tell_checkpoint()
        return figures

    def _agree(self, result: StepResult) -> _Agreed:
        """One sum over the ranks for all that they have to tell each other at the end of a step."""
        stop = self._terminated.is_set() or self._parts.should_stop()
        look = self._main and self._parts.preempted is not None and time.monotonic() >= self._next_look
        if look:
            self._next_look = time.monotonic() + NOTICE_INTERVAL_S
        flags = torch.tensor([self._checkpointer.writing, stop, look], dtype=torch.float64, device=self._parts.device)
        loss, *told = all_sum(torch.cat([result.losses_b.double().sum()[None], flags])).tolist()
        return _Agreed(loss, *(number > 0 for number in told))

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

    def _figures(self, step: int, batch: Batch, result: StepResult, loss_sum: float) -> dict[str, float]:
        """A step's line of metrics.jsonl."""
        parts = {name: watch.seconds for name, watch in result.times.items()}
        if self._weighting is not None:
            self._clock.move("step", "weigh", parts.pop("weigh"))
        if self._upper is not None and self._clock.exact:
            parts["backward"] -= self._upper.watch_seconds
        seconds = self._clock.take()
        tokens = self._config.train.global_batch * self._parts.seq_len
        total = sum(seconds.values())
        figures = {
            "step": step,
            "tokens": step * tokens,
            "loss": loss_sum / self._config.train.global_batch,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "tokens_per_s": tokens / total,
            **{f"seconds/{name}": value for name, value in seconds.items()},
            **{f"step_seconds/{name}": parts[name] for name in ("forward", "backward", "optimizer")},
        }
        if self._weighting is not None and result.scores_B is not None:
            figures |= self._weight_figures(step, batch, result, seconds)
        return figures

    def _weight_figures(
        self, step: int, batch: Batch, result: StepResult, seconds: dict[str, float]
    ) -> dict[str, float]:
        assert self._weighting is not None and result.scores_B is not None
        weights_B, size = result.weights_B, self._config.train.global_batch
        ess = float(effective_sample_size(weights_B))
        if self._config.weighting.method == "dwm":
            self._guard(step, (ess - 1) / (size - 1) if size > 1 else 1.0)
            self._alarm(step, float(normalised_entropy(weights_B)))
        keys_B2 = all_gather_rows(torch.stack([batch.sample_ids, batch.domains], dim=1).to(self._parts.device))
        losses_B = all_gather_rows(result.losses_b)[:size]
        ids, codes = keys_B2[:size].T.tolist()
        relative = (weights_B * size).tolist()
        if self._main and step % self._config.tracking.weights_every == 0:
            self._weights_log.add(step, ids, codes, losses_B.tolist(), result.scores_B.tolist(), relative)
        figures = {
            "dwm/ess": ess,
            "dwm/entropy": float(normalised_entropy(weights_B)),
            **self._weighting.metrics,
            "dwm/overhead_frac": overhead(seconds),
        }
        if self._upper is not None:
            figures |= self._upper.figures(step - 1, seconds)
        for code, name in enumerate(self._parts.domains):
            of_domain = [w for w, c in zip(relative, codes, strict=True) if c == code]
            if of_domain:
                figures[f"weight/{name}"] = sum(of_domain) / len(of_domain)
        return figures

    def _alarm(self, step: int, entropy: float) -> None:
        """Say once that the weights are concentrating, long before the guard stops the run."""
        if entropy < self._config.dwm.min_entropy and not self._alarmed:
            self._alarmed = True
            if self._main:
                print(
                    f"[{self._config.name}] warning: at step {step} the weights' entropy is {entropy:.3f} of log B, "
                    f"below dwm.min_entropy = {self._config.dwm.min_entropy:g}: raise bilevel.kl or dwm.temperature",
                    flush=True,
                )

    def _guard(self, step: int, ess_fraction: float) -> None:
        floor = self._config.dwm.min_ess_fraction
        if not ess_fraction >= floor:  # so that NaN counts as a collapse
            raise TrainingError(
                f"the weights have collapsed at step {step}: ESS is at {ess_fraction:.3f} of its range, below "
                f"dwm.min_ess_fraction = {floor}: raise bilevel.kl, dwm.floor or dwm.temperature; the last checkpoint "
                "is intact"
            )

    def _record_version(self, step: int) -> None:
        points, steps = self._config.dwm.trajectory_points, self._config.train.steps
        if self._parts.on_version is not None and step * points // steps > (step - 1) * points // steps:
            self._parts.on_version(step)

    def _checkpoint(self, step: int, cursor: Cursor, figures: dict[str, float]) -> None:
        self._tell_checkpoint()
        if self._main and self._weighting is not None:
            self._weights_log.flush(step)  # first: what a lost checkpoint leaves behind is written anew on resuming
        self._checkpointer.save(step, cursor)
        self._saved = figures

    def _tell_checkpoint(self) -> None:
        """Wait for the checkpoint that is being written, if there is one, and tell that it is whole."""
        path = self._checkpointer.wait()
        if path is not None and self._parts.on_checkpoint is not None:
            self._parts.on_checkpoint(step_of(path), path, self._saved)

    def _open_logs(self, step: int) -> None:
        self._sinks: list[MetricSink] = []
        if not self._main:
            return
        run_dir = self._config.run_dir
        self._sinks = [JsonlSink(run_dir / "metrics.jsonl", step), *self._parts.sinks]
        if self._weighting is not None:
            self._weights_log = WeightsWriter(run_dir / "weights", self._parts.domains, step)
        lines = read_metrics(run_dir / "metrics.jsonl")
        self._time_s = lines[-1]["time_s"] if lines else 0.0

    def _log(self, figures: dict[str, float]) -> dict[str, float]:
        """Hand a step's figures to the sinks; `time_s` is training time, without evaluation and checkpoints."""
        if self._main:
            self._time_s += sum(value for key, value in figures.items() if key.startswith("seconds/"))
            figures = {**figures, "time_s": self._time_s}
            with self._clock.phase("log"):
                for sink in self._sinks:
                    sink.log(figures)
        return figures
