"""A configured run on some GPUs: memory, step time, communication, overhead of the upper level, and totals."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ray_dwm.core import budget
from ray_dwm.core.costs import Speed, StepTime, dwm_forward_seconds, forward_seconds, offload_seconds
from ray_dwm.core.links import Links
from ray_dwm.core.memory import FRAMEWORK, Phase
from ray_dwm.core.traffic import Traffic, added, gather, lm_traffic, step_traffic
from ray_dwm.models.dwm import SIZES
from ray_dwm.planning.inputs import Job
from ray_dwm.planning.memory import host_bytes, run_peak
from ray_dwm.planning.visit import Visit, lm_step, visit

USABLE = 0.9
"""Part of what CUDA reports of a GPU's memory that a plan fills: predictions are within a tenth of what is measured
(benchmarks/memory_model.py), and an allocator loses some to fragments."""
HOST_USABLE = 0.8
"""Part of a host's memory that a plan fills, a figure of ours: the rest is for the system, Ray and its object store."""

REVIEWS = 8
"""Choices of a budget that are followed; two or three are enough."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run will need."""

    job: Job
    speed: Speed
    memory: Phase
    """The peak of a rank, without what the framework needs beside tensors; of an elastic group, with the fewest too."""
    host: float
    """Bytes that the run's ranks hold in a node's memory where parameters are there; 0 where they are not."""
    step: StepTime
    """Of an LM step alone."""
    weigh: float
    """Seconds that weighing adds to every step."""
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
        return rooms(self.speed, self.memory, self.host)[0]

    @property
    def host_room(self) -> float:
        """Bytes that are left of a node's memory; negative: that lack."""
        return rooms(self.speed, self.memory, self.host)[1]

    @property
    def lacks(self) -> float:
        """Bytes that lack on a GPU and in a node's memory."""
        return max(0.0, -self.room) + max(0.0, -self.host_room)

    @property
    def fits(self) -> bool:
        """Whether GPU and host have what is needed."""
        return self.lacks == 0

    @property
    def gpus(self) -> float:
        """That are held: one for each worker, and the DWM actor's."""
        cluster = self.job.config.cluster
        return self.job.workers + (cluster.dwm_gpus if self.job.config.learns_dwm else 0.0)

    @property
    def overhead(self) -> float:
        """What weights and the DWM add, over an LM step alone."""
        added = self.weigh + (self.visit.total / self.every if self.visit is not None else 0.0)
        return added / self.step.total

    @property
    def step_seconds(self) -> float:
        """Of a mean step."""
        return self.step.total * (1 + self.overhead)

    @property
    def tokens_per_s(self) -> float:
        """Over all workers."""
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
        """Of all GPUs that are held."""
        return self.hours * self.gpus


def estimate(job: Job, speed: Speed) -> Estimate:
    """What a run will need."""
    step = lm_step(job, speed)
    step = replace(step, transfer=offload_seconds(job.llama, job.layout, speed, job.micro_batches))
    weigh, traffic = _weigh(job, speed)
    traffic = added((1, lm_traffic(job.llama, job.layout, job.copies, job.micro_batches)), (1, traffic))
    found, every, target_batch = None, math.inf, 0
    if job.config.learns_dwm:
        settled = job if job.every else _within_budget(job, speed, step, weigh)
        every, target_batch = settled.every, settled.config.bilevel.target_batch
        found, sent = visit(settled, speed, step)
        traffic = added((1, traffic), (1 / every, sent))
    memory, host = held(job, speed)
    links = Links.of(speed.gpu, job.layout, job.copies)
    return Estimate(job, speed, memory, host, step, weigh, found, every, target_batch, traffic, links)


def held(job: Job, speed: Speed) -> tuple[Phase, float]:
    """(the peak of a rank, bytes in a node's host), with as few workers as an elastic group may have, too."""
    sizes = [job, job.smallest] if job.config.cluster.elastic else [job]
    memory = max((run_peak(x) for x in sizes), key=lambda phase: phase.total)
    return memory, max(host_bytes(x, speed.gpu.per_node) for x in sizes)


def rooms(speed: Speed, memory: Phase, host: float) -> tuple[float, float]:
    """Bytes that are left of a GPU and of a node's memory; negative: that lack."""
    gpu = speed.gpu
    return USABLE * gpu.memory - memory.total - FRAMEWORK, HOST_USABLE * gpu.host_memory - host


def _weigh(job: Job, speed: Speed) -> tuple[float, Traffic]:
    """Seconds and bytes that weights add to every step: the DWM's forward, and what is found out about sequences.

    Where micro-batches accumulate, statistics take forwards of their own; they leave the root gathered, and without
    resharding the blocks too, so the step need not gather those again.
    """
    config, lm, passes = job.config, (job.llama, job.layout, job.copies), job.micro_batches
    if config.weighting.method == "uniform":
        return 0.0, {}
    tokens, numbers, seconds = job.local_batch * job.seq_len, job.statistics, 0.0
    if config.weighting.method == "dwm":
        size = SIZES[config.dwm.size]
        numbers += size["width"] + 1
        seconds += dwm_forward_seconds(size["width"], size["layers"], speed, tokens)
    traffic = step_traffic(job.workers, job.rows, numbers)
    links = Links.of(speed.gpu, job.layout, job.copies)
    gathers = (
        (config.weighting.method == "dwm") + (job.statistics > 0) + 2
    )  # encodings, statistics; for the record: two
    seconds += links.seconds(traffic)["DWM"] + gathers * links.all_latency
    if job.statistics and passes > 1:
        seconds += forward_seconds(*lm, speed, passes, tokens, job.seq_len)
        again = passes * job.llama.layers * job.llama.block_parameters if job.layout.reshard else 0
        traffic["all-gather"] = gather(job.layout.compute * again, job.layout.shard)
    if config.weighting.method == "joint_update_aware":
        more, sent = _anchor(job, speed)
        seconds, traffic = seconds + more, added((1, traffic), (1, sent))
    return seconds, traffic


def _anchor(job: Job, speed: Speed) -> tuple[float, Traffic]:
    """Of `joint_update_aware`, in a mean step: the target sequences' embeddings (engine/baselines.py)."""
    config, lm = job.config.weighting, (job.llama, job.layout, job.copies)
    share = -(-config.anchor_sequences // job.workers)
    passes = -(-share // job.config.train.micro_batch)
    seconds = forward_seconds(*lm, speed, passes, share * job.seq_len, job.seq_len)
    sent = lm_traffic(*lm, passes, backward=False)
    sent["DWM"] = gather(4 * share * job.workers * job.llama.width, job.workers)
    return seconds / config.anchor_every, added((1 / config.anchor_every, sent))


def _within_budget(job: Job, speed: Speed, step: StepTime, weigh: float) -> Job:
    """The run with N and target batch of its budget (bilevel.every=0), as it would choose them from these times.

    A run measures anew after a choice, and a smaller target batch need not take less: every rank has at least one of
    its sequences. So the choice is made until it stays.
    """
    config, unit = job.config.bilevel, 1 + len(job.config.data.more_targets)
    settled = _with_bilevel(job, budget.USUAL_EVERY, config.target_batch)
    for _ in range(REVIEWS):
        found, _ = visit(settled, speed, step)
        costs = budget.Costs(
            plain=step.total,
            always=weigh,
            fixed=found.direction + found.contraction + found.communication + found.checks,
            target_sequence=found.target_gradient / settled.config.bilevel.target_batch,
        )
        chosen = budget.choose(costs, config.max_overhead, config.target_batch, unit)
        before, settled = settled, _with_bilevel(job, chosen.every, chosen.target_batch)
        if settled == before:
            break
    return settled


def _with_bilevel(job: Job, every: int, target_batch: int) -> Job:
    bilevel = replace(job.config.bilevel, every=every, target_batch=target_batch)
    return replace(job, config=replace(job.config, bilevel=bilevel))
