"""The peak memory of a rank of a configured run."""

from __future__ import annotations

from ray_dwm.core.activations import FP32
from ray_dwm.core.memory import Phase, pass_phases, peak
from ray_dwm.core.upper_memory import upper_phases
from ray_dwm.models.dwm import SIZES
from ray_dwm.planning.inputs import Job


def plain_peak(job: Job) -> Phase:
    """Of a step that is no bi-level step, without a DWM."""
    return peak(pass_phases(job.llama, job.layout, job.micro_batch))


def run_peak(job: Job) -> Phase:
    """Of all steps of the run, audited ones included."""
    found = [plain_peak(job).plus(bilevel=weighing(job))]
    if job.upper is not None:
        audits = job.config.bilevel.fidelity_every > 0
        for audited in {False, audits}:
            found.append(upper_peak(job, audited))
    return peak(found)


def upper_peak(job: Job, audited: bool) -> Phase:
    """Of a bi-level step."""
    assert job.upper is not None
    phases = upper_phases(job.llama, job.layout, job.micro_batch, job.upper, audited)
    return peak(phases).plus(bilevel=weighing(job))


def weighing(job: Job) -> float:
    """The DWM's replica, and the widest tensors of its encoder over the local batch.

    Two versions in flight, each with its optimizer's moments, are in the host's memory: without GPUs the same.
    """
    if not job.dwm_parameters:
        return 0
    width = SIZES[job.config.dwm.size]["width"]
    copies = 1 + (2 * 3 if job.config.cluster.gpus_per_worker == 0 else 0)
    return FP32 * (copies * job.dwm_parameters + job.local_batch * job.seq_len * 6 * width)


def host_bytes(job: Job, per_node: int) -> float:
    """Of a node whose host holds parameters, gradients and optimizer of its ranks' shards: 0 where GPUs hold them.

    With them: the copy of parameters and optimizer that an asynchronous checkpoint writes from, and what waits to be
    read. Pinned tensors are not rounded up to powers of two here, which torch's host allocator may do.
    """
    layout = job.layout
    if not layout.offload:
        return 0.0
    numbers = 2 + layout.moments + (1 + layout.moments if job.config.checkpoint.asynchronous else 0)
    waiting = job.config.cluster.ingest_memory_mb * 2**20
    return min(per_node, job.workers) * (FP32 * numbers * job.llama.parameters / layout.shard + waiting)
