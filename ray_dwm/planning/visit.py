"""A bi-level step: the seconds it takes beyond the LM's own, and the bytes it sends."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from ray_dwm.core.costs import Speed, StepTime, estimator_seconds, forward_seconds, micro_batches, passes_time
from ray_dwm.core.links import Links
from ray_dwm.core.traffic import Passes, Traffic, added, audit_traffic, lm_traffic, upper_collectives, upper_traffic
from ray_dwm.core.upper_memory import FINITE_DIFFERENCES, GHOSTS, Upper
from ray_dwm.planning.inputs import Job
from ray_dwm.planning.utilisation import eager_share


@dataclass(frozen=True, slots=True)
class Visit:
    """Seconds that a bi-level step takes beyond the LM's own."""

    target_gradient: float
    """In the mean, where it serves several steps."""
    direction: float
    contraction: float
    communication: float
    """Of direction and contraction, as far as nothing hides it."""
    eager: float
    """What the LM's step takes more where the ghosts watch it, which compiled code cannot be: it runs uncompiled."""
    checks: float
    """Of a checked step, spread over all of them."""

    @property
    def total(self) -> float:
        """Seconds."""
        parts = self.target_gradient, self.direction, self.contraction, self.communication, self.eager, self.checks
        return sum(parts)


def visit(job: Job, speed: Speed, step: StepTime) -> tuple[Visit, Traffic]:
    """A mean bi-level step of a run that learns a DWM, and what a rank sends in it beyond the LM's step.

    Args:
        step: the LM's.
    """
    upper, config, links = _upper(job), job.config.bilevel, Links.of(speed.gpu, job.layout, job.copies)
    fresh, stale = refreshes(job.update_steps, config.reuse, config.max_staleness, config.fidelity_every)
    stale = 1.0 if config.target_at == "theta" else stale  # the check's own target gradient is at theta'
    targets = [(upper.sets * number, size) for number, size in micro_batches(upper.targets, upper.at_once)]
    gradient = passes_time(job.llama, job.layout, job.copies, speed, targets, job.seq_len).total
    passes = Passes(
        step=job.micro_batches,
        chunks=job.head_chunks,
        target=sum(number for number, _ in targets),
        contracted=-(-upper.contracted // job.micro_batch.sequences),
    )
    shared = replace(passes, target=fresh * passes.target)
    sent = upper_traffic(job.llama, job.layout, job.copies, upper, shared, job.seq_len, job.rows)
    parts = estimator_seconds(job.llama, job.layout, speed, upper, upper.contracted * job.seq_len, job.seq_len)
    own = lm_traffic(job.llama, job.layout, job.copies, shared.target)
    extra = sum(links.seconds({kind: sent[kind] - own.get(kind, 0.0) for kind in sent}).values())
    extra += links.shard_latency * upper_collectives(job.llama, job.layout, upper, passes)
    extra += links.all_latency * (3 + (upper.statistics > 0))  # token ids, statistics, alignments and their places
    hides = parts["contraction"] if upper.estimator in (*FINITE_DIFFERENCES, "ghost") else 0.0
    checks = 0.0
    if config.fidelity_every:
        seconds, checked = _audit(job, speed, upper, passes)
        again = lm_traffic(job.llama, job.layout, job.copies, stale * passes.target)
        checks = (seconds + step.total + stale * gradient) / config.fidelity_every
        sent = added((1, sent), (1 / config.fidelity_every, checked), (1 / config.fidelity_every, again))
    eager = _uncompiled(job, speed, step) if upper.estimator in GHOSTS else 0.0
    found = Visit(fresh * gradient, parts["direction"], parts["contraction"], max(0.0, extra - hides), eager, checks)
    return found, sent


def lm_step(job: Job, speed: Speed) -> StepTime:
    """The LM's step alone, without what an offloaded optimizer takes."""
    parts = micro_batches(job.local_batch, job.micro_batch.sequences)
    return passes_time(job.llama, job.layout, job.copies, speed, parts, job.seq_len)


@lru_cache(maxsize=256)
def refreshes(steps: tuple[int, ...], reuse: int, max_staleness: int, audits: int) -> tuple[float, float]:
    """(part of the bi-level steps that make a target gradient, part of the checked ones that make none).

    As engine/target.py decides it.

    Args:
        steps: LM steps of the bi-level steps.
        audits: bi-level steps from one check to the next; 0: none.
    """
    last, made = -1, []
    for update, step in enumerate(steps):
        due = last < 0 or step - last > max_staleness or update % reuse == 0
        last = step if due else last
        made.append(due)
    checked = made[::audits] if audits else [True]
    return sum(made) / len(made), 1 - sum(checked) / len(checked)


def _upper(job: Job) -> Upper:
    assert job.upper is not None, "the run learns no DWM"
    return job.upper


def _uncompiled(job: Job, speed: Speed, step: StepTime) -> float:
    """What an LM step takes longer without its compiled code."""
    if not job.config.parallel.compile:
        return 0.0
    slower = replace(speed, mfu=speed.mfu * eager_share(speed.bf16))
    return lm_step(job, slower).total - step.total


def _audit(job: Job, speed: Speed, upper: Upper, passes: Passes) -> tuple[float, Traffic]:
    """Seconds and bytes of a check's forwards; its bytes with those of the step that is taken again."""
    judged = min(upper.contracted, -(-job.config.bilevel.fidelity_sequences // job.workers))
    of_judge = -(-judged // job.micro_batch.sequences)
    lm = job.llama, job.layout, job.copies
    seconds = 4 * forward_seconds(*lm, speed, of_judge, judged * job.seq_len, job.seq_len)
    seconds += 2 * forward_seconds(*lm, speed, passes.target, upper.targets * upper.sets * job.seq_len, job.seq_len)
    return seconds, audit_traffic(*lm, passes, (judged, of_judge))
