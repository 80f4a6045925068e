"""A plan for people and for programs."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.table import Table

from ray_dwm.core.memory import FRAMEWORK, PARTS
from ray_dwm.core.traffic import KINDS
from ray_dwm.planning.estimate import HOST_USABLE, USABLE, Estimate
from ray_dwm.planning.plan import Plan
from ray_dwm.planning.search import overrides, shortfall

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
    columns = {"as configured": plan.configured, "cheapest that fits": plan.best}
    shown = {name: x for name, x in columns.items() if x is not None}
    table = Table()
    table.add_column("", no_wrap=True)
    for name in shown:
        table.add_column(name, justify="right")
    for title, rows in _SECTIONS.items():
        found = [rows(x, plan) for x in shown.values()]
        if not found[0]:
            continue
        table.add_section()
        table.add_row(f"[bold]{title}[/bold]")
        for name in found[0]:
            table.add_row(f"  {name}", *[column[name] for column in found])
    console.print(table)
    if plan.configured is not None and not plan.configured.fits:
        console.print(f"as configured it does not fit: it needs {shortfall(plan.configured)}", highlight=False)
    same = " (the configured layout)" if plan.best_is_configured else ""
    console.print(f"cheapest that fits{same}:", highlight=False)
    console.print(f"  {overrides(plan.best)}", highlight=False)


def _heading(plan: Plan) -> list[str]:
    job, best = plan.best.job, plan.best
    train, llama = job.config.train, job.llama
    tokens = train.steps * train.global_batch * job.seq_len
    flops = llama.flops_per_token(job.seq_len)
    actor = f" and {best.gpus - job.workers:g} for the DWM's actor" if best.gpus > job.workers else ""
    lines = [
        f"{job.config.lm.preset}: {llama.parameters / 1e6:,.1f} M parameters, {flops / 1e9:.2f} GFLOPs a token; "
        f"{train.steps:,} steps of {train.global_batch:,} x {job.seq_len:,} tokens, {tokens / 1e9:.2f} B; "
        f"{job.workers} {plan.gpu}{actor}",
        f"MFU assumed: {best.speed.mfu:.1%}, {plan.mfu_source}",
    ]
    if job.assumed:
        lines.append(f"assumed: {'; '.join(job.assumed)}")
    return [*lines, *plan.notes]


def _memory(x: Estimate, plan: Plan) -> dict[str, str]:
    parts = {_NAMES.get(part, part): f"{x.memory.parts[part] / GIB:.2f}" for part in PARTS}
    found = {
        **parts,
        "framework (assumed)": f"{FRAMEWORK / GIB:.2f}",
        "at its peak": f"{x.needed / GIB:.2f}",
        f"{USABLE:.0%} of the GPU": f"{USABLE * x.speed.gpu.memory / GIB:.2f}",
    }
    if any(y is not None and y.host for y in (plan.configured, plan.best)):
        found["a node's host"] = f"{x.host / GIB:.2f}"
        found[f"{HOST_USABLE:.0%} of the host"] = f"{HOST_USABLE * x.speed.gpu.host_memory / GIB:.2f}"
    return {**found, "peak at": x.memory.name}


def _step(x: Estimate, plan: Plan) -> dict[str, str]:
    step = x.step
    rows = {
        "compute": step.compute,
        "computed again": step.again,
        "communication not hidden": step.exposed,
        "to the host and back": step.transfer,
        "LM step": step.total,
        "weighing the batch": x.weigh,
    }
    return _milliseconds(rows)


def _bilevel(x: Estimate, plan: Plan) -> dict[str, str]:
    if x.visit is None:
        return {}
    rows = {
        "target gradient": x.visit.target_gradient,
        "direction": x.visit.direction,
        "contraction": x.visit.contraction,
        "communication not hidden": x.visit.communication,
        "LM step without its compiled code": x.visit.eager,
        "checks, in the mean": x.visit.checks,
        "together": x.visit.total,
    }
    return _milliseconds(rows)


def _milliseconds(rows: dict[str, float]) -> dict[str, str]:
    return {name: f"{1e3 * seconds:,.2f}" for name, seconds in rows.items()}


def _shares(x: Estimate, plan: Plan) -> dict[str, str]:
    step, found = x.step, {}
    if x.visit is not None:
        found["LM steps for each bi-level step"] = f"{x.every:g}"
        found["target sequences of each"] = str(x.target_batch)
    found["overhead of weights and DWM"] = f"{x.overhead:.2%}"
    found["a mean step, ms"] = f"{1e3 * x.step_seconds:,.2f}"
    hidden = 1 - step.exposed / step.communication if step.communication else 1.0
    return {**found, "communication hidden": f"{hidden:.1%}"}


def _traffic(x: Estimate, plan: Plan) -> dict[str, str]:
    seconds = x.links.seconds(x.traffic)
    return {k: f"{x.traffic.get(k, 0) / 1e9:.3f} ({1e3 * seconds.get(k, 0):.2f})" for k in KINDS}


def _totals(x: Estimate, plan: Plan) -> dict[str, str]:
    found = {
        "tokens/s": f"{x.tokens_per_s:,.0f}",
        "tokens/s of a worker": f"{x.tokens_per_s / x.job.workers:,.0f}",
        "MFU that comes out": f"{x.mfu:.1%}",
        "hours": f"{x.hours:,.1f}",
        "GPU-hours": f"{x.gpu_hours:,.0f}",
    }
    return found | ({"cost": f"{x.gpu_hours * plan.price:,.0f}"} if plan.price else {})


_SECTIONS = {
    "memory of a GPU, GiB": _memory,
    "a step takes, ms": _step,
    "a bi-level step takes more, ms": _bilevel,
    "in the mean": _shares,
    "a GPU sends in a mean step, GB (ms)": _traffic,
    "the run": _totals,
}


def as_json(plan: Plan) -> dict[str, Any]:
    """Plain values in bytes and seconds."""
    job = plan.best.job
    return {
        "preset": job.config.lm.preset,
        "parameters": job.llama.parameters,
        "flops_per_token": job.llama.flops_per_token(job.seq_len),
        "vocab": job.llama.vocab,
        "seq_len": job.seq_len,
        "gpus": job.workers,
        "dwm_gpus": plan.best.gpus - job.workers,
        "gpu": plan.gpu,
        "mfu_assumed": plan.best.speed.mfu,
        "mfu_source": plan.mfu_source,
        "assumed": list(job.assumed),
        "notes": list(plan.notes),
        "best_is_configured": plan.best_is_configured,
        "configured": _values(plan.configured, plan.price) if plan.configured is not None else None,
        "best": _values(plan.best, plan.price),
    }


def _values(x: Estimate, price: float) -> dict[str, Any]:
    visit = None
    if x.visit is not None:
        names = ("target_gradient", "direction", "contraction", "communication", "eager", "checks", "total")
        visit = {name: getattr(x.visit, name) for name in names}
    return {
        "overrides": overrides(x),
        "fits": x.fits,
        "memory_bytes": {**x.memory.parts, "framework": FRAMEWORK, "needed": x.needed, "room": x.room},
        "host_bytes": x.host,
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
