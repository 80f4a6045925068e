"""A configured run on some GPUs: memory, step time, communication, overhead of the upper level, and totals."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ray_dwm.core import budget
from ray_dwm.core.costs import (
    Speed,
    StepTime,
    dwm_forward_seconds,
    estimator_seconds,
    forward_flops,
    offload_seconds,
    pass_time,
)
from ray_dwm.core.memory import FRAMEWORK, Phase
from ray_dwm.core.traffic import Links, Traffic, lm_traffic, step_traffic, upper_traffic
from ray_dwm.core.upper_memory import FINITE_DIFFERENCES, Upper
from ray_dwm.models.dwm import SIZES
from ray_dwm.planning.inputs import Job
from ray_dwm.planning.memory import run_peak

USABLE = 0.9
"""Part of a GPU's memory that a plan fills: predictions are within a tenth of what is measured
(benchmarks/memory_model.py), and an allocator loses some to fragments."""


@dataclass(frozen=True, slots=True)
class Visit:
    """Seconds that a bi-level step takes beyond the LM's own."""

    target_gradient: float
    direction: float
    contraction: float
    communication: float
    """Of direction and contraction, as far as nothing hides it."""
    checks: float
    """Of a checked step, spread over all of them."""

    @property
    def total(self) -> float:
        """Seconds."""
        return self.target_gradient + self.direction + self.contraction + self.communication + self.checks


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run will need."""

    job: Job
    speed: Speed
    memory: Phase
    """The peak of a rank, without what the framework needs beside tensors."""
    step: StepTime
    """Of an LM step alone."""
    weigh: float
    """Seconds that the DWM's forward adds to every step."""
    visit: Visit | None
    every: float
    target_batch: int
    traffic: Traffic
    """Bytes that a rank sends in a mean step."""
    links: Links

    @property
    def needed(self) -> float:
        """Bytes of a GPU."""
        return self.memory.total + FRAMEWORK

    @property
    def room(self) -> float:
        """Bytes that are left; negative: that lack."""
        return USABLE * self.speed.gpu.memory - self.needed

    @property
    def fits(self) -> bool:
        """Whether a GPU has them."""
        return self.room >= 0

    @property
    def overhead(self) -> float:
        """What the DWM adds, over an LM step alone."""
        added = self.weigh + (self.visit.total / self.every if self.visit is not None else 0.0)
        return added / self.step.total

    @property
    def step_seconds(self) -> float:
        """Of a mean step."""
        return self.step.total * (1 + self.overhead)

    @property
    def tokens_per_s(self) -> float:
        """Over all GPUs."""
        return self.job.config.train.global_batch * self.job.seq_len / self.step_seconds

    @property
    def mfu(self) -> float:
        """What comes out: model FLOPs of the LM over peak, everything included."""
        flops = self.tokens_per_s / self.job.workers * self.job.llama.flops_per_token(self.job.seq_len)
        return flops / self.speed.peak

    @property
    def hours(self) -> float:
        """Of all steps, without evaluation and checkpoints."""
        return self.step_seconds * self.job.config.train.steps / 3600

    @property
    def gpu_hours(self) -> float:
        """Over all GPUs."""
        return self.hours * self.job.workers


def estimate(job: Job, speed: Speed) -> Estimate:
    """What a run will need."""
    copies = job.workers // job.layout.shard
    links = Links.of(speed.gpu, job.layout, copies)
    micro, passes = job.micro_batch, job.micro_batches
    step = pass_time(job.llama, job.layout, copies, speed, passes, micro.tokens, job.seq_len)
    step = replace(step, transfer=offload_seconds(job.llama, job.layout, speed, passes))
    traffic = lm_traffic(job.llama, job.layout, copies, passes)
    weigh = _weigh(job, speed)
    visit, every, target_batch = None, math.inf, 0
    upper = job.upper
    if upper is not None:
        every, target_batch = job.every, job.config.bilevel.target_batch
        sent = _upper_traffic(job, upper)
        visit = _visit(job, speed, links, upper, step, sent)
        if every == 0:
            chosen = _choose(job, visit, step.total, weigh)
            every, target_batch = chosen.every, chosen.target_batch
            share = target_batch / job.config.bilevel.target_batch
            visit = replace(visit, target_gradient=visit.target_gradient * share)
        for kind, amount in sent.items():
            traffic[kind] = traffic.get(kind, 0) + amount / every
    for kind, amount in traffic_of_weights(job).items():
        traffic[kind] = traffic.get(kind, 0) + amount
    return Estimate(job, speed, run_peak(job), step, weigh, visit, every, target_batch, traffic, links)


def traffic_of_weights(job: Job) -> Traffic:
    """Bytes that a rank sends in every step because sequences have weights."""
    if job.config.weighting.method != "dwm":
        return {}
    return step_traffic(job.workers, job.config.train.global_batch, SIZES[job.config.dwm.size]["width"])


def _weigh(job: Job, speed: Speed) -> float:
    """The DWM's forward, and the LM's over the batch where it looks at losses that no forward has yet."""
    config = job.config
    if config.weighting.method != "dwm":
        return 0.0
    size, tokens = SIZES[config.dwm.size], job.local_batch * job.seq_len
    again = config.dwm.lm_features and job.micro_batches > 1
    extra = tokens * forward_flops(job.llama, job.seq_len) / speed.flops if again else 0.0
    return dwm_forward_seconds(size["width"], size["layers"], speed, tokens) + extra


def _target_passes(job: Job, upper: Upper) -> tuple[int, int]:
    """(micro-batches of all target sets, sequences in each)."""
    sequences = min(job.micro_batch.sequences, upper.targets)
    return upper.sets * -(-upper.targets // sequences), sequences


def _upper_traffic(job: Job, upper: Upper) -> Traffic:
    copies, batch = job.workers // job.layout.shard, job.config.train.global_batch
    passes = -(-upper.contracted // job.micro_batch.sequences)
    target = _target_passes(job, upper)[0]
    return upper_traffic(job.llama, job.layout, copies, upper, target, passes, job.seq_len, batch)


def _visit(job: Job, speed: Speed, links: Links, upper: Upper, step: StepTime, sent: Traffic) -> Visit:
    config, llama, copies = job.config.bilevel, job.llama, job.workers // job.layout.shard
    target, sequences = _target_passes(job, upper)
    gradient = pass_time(llama, job.layout, copies, speed, target, sequences * job.seq_len, job.seq_len).total
    tokens = upper.contracted * job.seq_len
    parts = estimator_seconds(llama, job.layout, speed, upper, tokens, job.seq_len)
    own = lm_traffic(llama, job.layout, copies, target)
    extra = sum(links.seconds({kind: sent[kind] - own.get(kind, 0.0) for kind in sent}).values())
    hides = parts["contraction"] if upper.estimator in (*FINITE_DIFFERENCES, "ghost") else 0.0
    checks = 0.0
    if config.fidelity_every:
        forward = forward_flops(llama, job.seq_len) * job.seq_len / speed.flops
        judged = -(-config.fidelity_sequences // job.workers)
        checks = (step.total + (4 * judged + 2 * upper.targets * upper.sets) * forward) / config.fidelity_every
    communication = max(0.0, extra - hides)
    return Visit(gradient / config.reuse, parts["direction"], parts["contraction"], communication, checks)


def _choose(job: Job, visit: Visit, plain: float, weigh: float) -> budget.Choice:
    """N and target batch of a budget (bilevel.every=0), as the run itself would choose them from these times."""
    config = job.config.bilevel
    per_sequence = visit.target_gradient / config.target_batch
    fixed = visit.direction + visit.contraction + visit.communication
    costs = budget.Costs(plain=plain, always=weigh, fixed=fixed, target_sequence=per_sequence)
    return budget.choose(costs, config.max_overhead, config.target_batch, 1 + len(job.config.data.more_targets))
