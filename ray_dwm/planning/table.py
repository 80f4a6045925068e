"""A plan for people and for programs."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.table import Table

from ray_dwm.core.memory import FRAMEWORK, PARTS
from ray_dwm.core.traffic import KINDS
from ray_dwm.planning.estimate import USABLE, Estimate
from ray_dwm.planning.plan import Plan
from ray_dwm.planning.search import overrides

GIB = 2**30
_NAMES = {
    "gathered": "parameters, gathered",
    "reduction": "gradients, on their way",
    "bilevel": "DWM and bi-level step",
}


def show(plan: Plan) -> None:
    """Print a plan."""
    console = Console(soft_wrap=True)
    for line in _heading(plan):
        console.print(line, highlight=False)
    table = Table()
    table.add_column("", no_wrap=True)
    for name in ("as configured", "cheapest that fits"):
        table.add_column(name, justify="right")
    both = (plan.configured, plan.best)
    sections = (
        ("memory of a GPU, GiB", _memory),
        ("time, ms", _time),
        ("a GPU sends in a step, GB (ms)", _traffic),
        (
            "the run",
            _totals,
        ),
    )
    for title, rows in sections:
        table.add_section()
        table.add_row(f"[bold]{title}[/bold]")
        found = [rows(x, plan) for x in both]
        for name in found[0]:
            table.add_row(f"  {name}", *[column[name] for column in found])
    console.print(table)
    if not plan.configured.fits:
        console.print(f"as configured it does not fit: {-plan.configured.room / GIB:.1f} GiB lack", highlight=False)
    console.print("cheapest that fits:", highlight=False)
    console.print(f"  {overrides(plan.best)}", highlight=False)


def _heading(plan: Plan) -> list[str]:
    job = plan.configured.job
    train, llama = job.config.train, job.llama
    tokens = train.steps * train.global_batch * job.seq_len
    flops = llama.flops_per_token(job.seq_len)
    lines = [
        f"{job.config.lm.preset}: {llama.parameters / 1e6:,.1f} M parameters, {flops / 1e9:.2f} GFLOPs a token; "
        f"{train.steps:,} steps of {train.global_batch:,} x {job.seq_len:,} tokens, {tokens / 1e9:.2f} B; "
        f"{job.workers} {plan.gpu}",
        f"MFU assumed: {plan.configured.speed.mfu:.1%}, {plan.mfu_source}",
    ]
    if job.assumed:
        lines.append(f"assumed: {'; '.join(job.assumed)}")
    if job.config.parallel.compile:
        lines.append("activations are those of uncompiled blocks: compiled ones keep less")
    return lines


def _memory(x: Estimate, plan: Plan) -> dict[str, str]:
    parts = {_NAMES.get(part, part): f"{x.memory.parts[part] / GIB:.2f}" for part in PARTS}
    return {
        **parts,
        "framework (assumed)": f"{FRAMEWORK / GIB:.2f}",
        "at its peak": f"{x.needed / GIB:.2f}",
        f"{USABLE:.0%} of the GPU": f"{USABLE * x.speed.gpu.memory / GIB:.2f}",
        "peak at": x.memory.name,
    }


def _time(x: Estimate, plan: Plan) -> dict[str, str]:
    step = x.step
    hidden = 1 - step.exposed / step.communication if step.communication else 1.0
    rows = {
        "compute": step.compute,
        "computed again": step.again,
        "communication not hidden": step.exposed,
        "to the host and back": step.transfer,
        "LM step": step.total,
        "DWM's forward": x.weigh,
    }
    if x.visit is not None:
        rows |= {
            "bi-level: target gradient": x.visit.target_gradient,
            "  direction": x.visit.direction,
            "  contraction": x.visit.contraction,
            "  communication": x.visit.communication,
            "  checks, in the mean": x.visit.checks,
        }
    rows["step, in the mean"] = x.step_seconds
    found = {name: f"{1e3 * seconds:,.2f}" for name, seconds in rows.items()}
    found["communication hidden"] = f"{hidden:.1%}"
    if x.visit is not None:
        found["bi-level step every"] = f"{x.every:g}"
        found["target sequences"] = str(x.target_batch)
    found["overhead of the DWM"] = f"{x.overhead:.2%}"
    return found


def _traffic(x: Estimate, plan: Plan) -> dict[str, str]:
    seconds = x.links.seconds(x.traffic)
    return {k: f"{x.traffic.get(k, 0) / 1e9:.3f} ({1e3 * seconds.get(k, 0):.2f})" for k in KINDS}


def _totals(x: Estimate, plan: Plan) -> dict[str, str]:
    found = {
        "tokens/s": f"{x.tokens_per_s:,.0f}",
        "tokens/s and GPU": f"{x.tokens_per_s / x.job.workers:,.0f}",
        "MFU that comes out": f"{x.mfu:.1%}",
        "hours": f"{x.hours:,.1f}",
        "GPU-hours": f"{x.gpu_hours:,.0f}",
    }
    return found | ({"cost": f"{x.gpu_hours * plan.price:,.0f}"} if plan.price else {})


def as_json(plan: Plan) -> dict[str, Any]:
    """Plain values in bytes and seconds."""
    job = plan.configured.job
    return {
        "preset": job.config.lm.preset,
        "parameters": job.llama.parameters,
        "flops_per_token": job.llama.flops_per_token(job.seq_len),
        "vocab": job.llama.vocab,
        "seq_len": job.seq_len,
        "gpus": job.workers,
        "gpu": plan.gpu,
        "mfu_assumed": plan.configured.speed.mfu,
        "mfu_source": plan.mfu_source,
        "assumed": list(job.assumed),
        "configured": _values(plan.configured, plan.price),
        "best": _values(plan.best, plan.price),
    }


def _values(x: Estimate, price: float) -> dict[str, Any]:
    visit = None
    if x.visit is not None:
        names = ("target_gradient", "direction", "contraction", "communication", "checks", "total")
        visit = {name: getattr(x.visit, name) for name in names}
    return {
        "overrides": overrides(x),
        "fits": x.fits,
        "memory_bytes": {**x.memory.parts, "framework": FRAMEWORK, "needed": x.needed, "room": x.room},
        "peak_at": x.memory.name,
        "seconds": {
            **{n: getattr(x.step, n) for n in ("compute", "again", "communication", "exposed", "transfer")},
            "lm_step": x.step.total,
            "weigh": x.weigh,
            "bilevel_step": visit,
            "step": x.step_seconds,
        },
        "bilevel_every": x.every if math.isfinite(x.every) else None,
        "target_batch": x.target_batch,
        "overhead": x.overhead,
        "traffic_bytes": x.traffic,
        "traffic_seconds": x.links.seconds(x.traffic),
        "tokens_per_s": x.tokens_per_s,
        "mfu": x.mfu,
        "hours": x.hours,
        "gpu_hours": x.gpu_hours,
        "cost": x.gpu_hours * price if price else None,
    }
