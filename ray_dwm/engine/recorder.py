"""What a run writes down: a line a step to metrics.jsonl and other sinks, every sequence's weight, and warnings."""

from __future__ import annotations

import math
from contextlib import ExitStack
from types import TracebackType

import torch
import torch.distributed as dist

from ray_dwm import logs
from ray_dwm.core.accounting import mfu
from ray_dwm.core.hardware import recognise
from ray_dwm.core.weighting import effective_sample_size, normalised_entropy
from ray_dwm.data.records import read_metrics
from ray_dwm.engine.batch import Batch
from ray_dwm.engine.clock import Clock, Stopwatch, overhead
from ray_dwm.engine.mesh import all_gather_rows, is_main
from ray_dwm.engine.messages import say
from ray_dwm.engine.metrics import JsonlSink, MetricSink, WeightsWriter
from ray_dwm.engine.parts import Parts
from ray_dwm.engine.step import StepResult
from ray_dwm.engine.upper import UpperLevel
from ray_dwm.errors import Collapsed

_FEW_STEPS = 10
"""In a row, in which the weights may be as uneven as can be: one batch may hold a sequence that is like no other."""


class CollapseGuard:
    """Stops a run whose weights stay on a few sequences."""

    def __init__(self, floor: float) -> None:
        """From which part of the ESS's range on all is well."""
        self._floor, self._low = floor, 0

    def look(self, step: int, ess_fraction: float) -> None:
        """See a step's (ESS - 1) / (B - 1).

        Raises:
            Collapsed: it is NaN, or has been too low for too long.
        """
        self._low = 0 if ess_fraction >= self._floor else self._low + 1
        if math.isnan(ess_fraction) or self._low > _FEW_STEPS:
            raise Collapsed(
                f"the weights have collapsed: at step {step} ESS is at {ess_fraction:.3f} of its range, below "
                f"dwm.min_ess_fraction = {self._floor} for {self._low} steps: raise bilevel.kl, dwm.floor or "
                "dwm.temperature; the last checkpoint is intact"
            )


class Recorder:
    """The figures of one attempt. All ranks make them together, rank 0 writes them down."""

    def __init__(self, parts: Parts, clock: Clock, upper: UpperLevel | None) -> None:
        """Takes charge of the sinks: `end` closes them, whether `open` was reached or not."""
        self._parts, self._config, self._clock, self._upper = parts, parts.config, clock, upper
        self._weighting = parts.weighting
        self._gpu = recognise(torch.cuda.get_device_name()) if parts.device.type == "cuda" else None
        self._main = is_main()
        self._alarmed = False
        self._guard = CollapseGuard(self._config.dwm.min_ess_fraction)
        self.held_up = Stopwatch()
        """How long checkpoints have held up training since the last line."""
        self._sinks: list[MetricSink] = list(parts.sinks) if self._main else []

    def open(self, step: int) -> None:
        """Continue after `step` steps: what was written down after it goes."""
        logs.bind(step=step)
        if not self._main:
            return
        run_dir = self._config.run_dir
        self._sinks.insert(0, JsonlSink(run_dir / "metrics.jsonl", step))
        if self._weighting is not None:
            self._weights_log = WeightsWriter(run_dir / "weights", self._parts.domains, step)
        lines = read_metrics(run_dir / "metrics.jsonl")
        self._time_s = lines[-1]["time_s"] if lines else 0.0

    def flush(self, step: int) -> None:
        """Write the weights up to step `step`; before its checkpoint, which may be lost: then they are written anew."""
        if self._main and self._weighting is not None:
            self._weights_log.flush(step)

    def end(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """The run has ended, with an error or without: close the sinks, also where one fails to."""
        del error, trace
        with ExitStack() as ending:
            for sink in self._sinks:
                ending.callback(sink.close, 0 if kind is None else 1)

    def log(self, figures: dict[str, float]) -> dict[str, float]:
        """Hand a step's figures to the sinks; `time_s` is training time, without evaluation and checkpoints."""
        logs.bind(step=int(figures["step"]))
        if self._main:
            self._time_s += sum(value for key, value in figures.items() if key.startswith("seconds/"))
            figures = {**figures, "time_s": self._time_s}
            with self._clock.phase("log"):
                for sink in self._sinks:
                    sink.log(figures)
        return figures

    def figures(self, step: int, batch: Batch, result: StepResult, loss_sum: float) -> dict[str, float]:
        """A step's line of metrics.jsonl."""
        times = {name: watch.seconds for name, watch in result.times.items()}
        if self._weighting is not None:
            self._clock.move("step", "weigh", times["weigh"])
        if self._upper is not None and self._clock.exact:
            times["backward"] -= self._upper.watch_seconds
        seconds = self._clock.take()
        tokens = self._config.train.global_batch * self._parts.seq_len
        rate = tokens / sum(seconds.values())
        figures = {
            "step": step,
            "tokens": step * tokens,
            "loss": loss_sum / self._config.train.global_batch,
            "lr": result.lr,
            "grad_norm": result.grad_norm,
            "tokens_per_s": rate,
            **self._utilisation(rate),
            **{f"seconds/{name}": value for name, value in seconds.items()},
            **{f"step_seconds/{name}": times[name] for name in ("forward", "backward", "optimizer")},
        }
        if held_up := self.held_up.seconds:
            figures["checkpoint_seconds"] = held_up
            self.held_up.reset()
        if self._weighting is not None and result.scores_B is not None:
            figures |= self._weight_figures(step, batch, result, seconds)
        return figures

    def _utilisation(self, tokens_per_s: float) -> dict[str, float]:
        """Model TFLOP/s of a worker, and their part of the device's dense peak where that is known."""
        per_worker, flops = tokens_per_s / dist.get_world_size(), self._parts.flops_per_token
        figures = {"tflops": per_worker * flops / 1e12}
        if self._gpu is not None:
            figures["mfu"] = mfu(per_worker, flops, self._gpu.peak(self._config.train.precision == "bf16"))
        return figures

    def _weight_figures(
        self, step: int, batch: Batch, result: StepResult, seconds: dict[str, float]
    ) -> dict[str, float]:
        assert self._weighting is not None and result.scores_B is not None
        weights_B, size = result.weights_B, self._config.train.global_batch
        ess = float(effective_sample_size(weights_B))
        if self._config.weighting.method == "dwm":
            self._guard.look(step, (ess - 1) / (size - 1) if size > 1 else 1.0)
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
                say(
                    self._config.run_dir,
                    f"warning: at step {step} the weights' entropy is {entropy:.3f} of log B, below dwm.min_entropy = "
                    f"{self._config.dwm.min_entropy:g}: raise bilevel.kl or dwm.temperature",
                )
