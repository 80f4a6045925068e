"""What a sweep would do: its space, what its trials ask of the cluster, how long each would take, and the sum."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice, product
from typing import Any

import optuna
from rich.console import Console
from rich.table import Table

from ray_dwm.config import RunConfig
from ray_dwm.config.space import described
from ray_dwm.config.tune import CONTROLS, LATER, UNIFORM, TuneConfig, default_of, with_values
from ray_dwm.logs import width
from ray_dwm.orchestration.cluster import connect
from ray_dwm.orchestration.experiment import make_ready
from ray_dwm.orchestration.experiment_checks import largest, resources_of
from ray_dwm.orchestration.study import distribution
from ray_dwm.orchestration.tune import Checked, concurrency
from ray_dwm.orchestration.tune_progress import text
from ray_dwm.planning.plan import as_configured


@dataclass(frozen=True)
class Planned:
    """A run that would be started."""

    scale: str
    name: str
    run: RunConfig
    values: dict[str, Any] = field(default_factory=dict)
    times: int = 1
    """Such runs: one for each seed."""


def planned(checked: Checked) -> list[Planned]:
    """All runs: the first scale's, as the sampler would draw them before it has learnt, and the promoted ones."""
    config, first = checked.config, checked.config.first
    base, found = checked.bases[first], []
    for name, values in islice(_trials(config, base), config.total):
        found.append(Planned(first, name, with_values(base, UNIFORM if name == "uniform" else values), values))
    for scale in list(config.scales)[1:]:
        base, seeds = checked.bases[scale], len(config.seeds)
        found.append(Planned(scale, "uniform", with_values(base, UNIFORM), times=seeds))
        found.append(Planned(scale, "defaults", base, times=seeds))
        for how in ("learn", *config.transfer):
            own = {"dwm.mode": how, **({} if how == "learn" else {"dwm.init_from": LATER, "dwm.trajectory": LATER})}
            found.append(Planned(scale, f"promoted, {how}", with_values(base, own), times=config.promote * seeds))
    return [each for each in found if each.times]


def _trials(config: TuneConfig, base: RunConfig) -> Iterator[tuple[str, dict[str, Any]]]:
    defaults = {key: default_of(base, key, domain) for key, domain in config.space.items()}
    yield CONTROLS[0], {key: value for key, value in defaults.items() if value is not None}
    yield CONTROLS[1], {}
    for number, point in enumerate(config.points, start=1):
        yield f"point-{number}", dict(point)
    if config.sampler == "grid":
        for number, values in enumerate(product(*(domain.points for domain in config.space.values()))):
            yield f"{number:04d}", dict(zip(config.space, values, strict=True))
        return
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=config.seed))
    spaces = {key: distribution(domain) for key, domain in config.space.items()}
    while True:
        trial = study.ask(fixed_distributions=spaces)
        yield f"{trial.number:04d}", dict(trial.params)


def show(checked: Checked, gpu: str) -> None:
    """Print it.

    Args:
        gpu: the kind with which hours are planned.

    Raises:
        ResourceError: the cluster that RAY_ADDRESS names can never hold one of the runs.
    """
    console, config, runs = Console(width=width(160), soft_wrap=True), checked.config, planned(checked)
    for table in (_space(checked), _resources(checked, runs)):
        console.print(table)
    if "RAY_ADDRESS" in os.environ:
        largest_of = [*checked.bases.values(), *checked.probes]
        connect(largest(largest_of))
        make_ready(largest_of)
        for scale, run in checked.bases.items():
            at = concurrency(config, [run, *(checked.probes if scale == config.first else ())])
            console.print(f"scale {scale}: {at} at once on this cluster", highlight=False)
    if any(not each.run.cluster.gpus_per_worker for each in runs):
        console.print("cluster.gpus_per_worker is 0: hours are planned for GPUs alone", highlight=False)
        return
    _hours(console, config, runs, gpu)


def _space(checked: Checked) -> Table:
    config, table = checked.config, Table("key", "searched", "as configured", title=f"Space of {checked.config.name}")
    for key, domain in config.space.items():
        default = default_of(checked.bases[config.first], key, domain)
        table.add_row(key, described(domain), "outside" if default is None else text(default))
    return table


def _resources(checked: Checked, runs: list[Planned]) -> Table:
    table = Table("scale", "LM", "runs", "workers", "CPUs of a run", "GPUs of a run", title="Resources")
    for scale, base in checked.bases.items():
        own, asked = [each for each in runs if each.scale == scale], resources_of(base)
        number, workers = sum(each.times for each in own), base.cluster.most_workers
        table.add_row(scale, base.lm.preset, str(number), str(workers), f"{asked['CPU']:g}", f"{asked['GPU']:g}")
    return table


def _hours(console: Console, config: TuneConfig, runs: list[Planned], gpu: str) -> None:
    keys = list(config.space)
    table = Table(
        "scale",
        "run",
        *(key.rpartition(".")[2] for key in keys),
        "times",
        "overhead",
        "hours",
        "GPU-hours",
        "fits",
        title=f"Plan on {gpu}",
    )
    total = 0.0
    for each in runs:
        found = as_configured(each.run, gpu)
        hours = found.gpu_hours * each.times
        total += hours
        values = [text(each.values[key]) if key in each.values else "" for key in keys]
        figures = [f"{found.overhead:.2%}", f"{found.hours:,.1f}", f"{hours:,.0f}", "yes" if found.fits else "no"]
        table.add_row(each.scale, each.name, *values, str(each.times), *figures)
    console.print(table)
    drawn = (
        "; what the sampler draws is drawn at random here, as its first trials are" if config.sampler == "tpe" else ""
    )
    console.print(f"total: {total:,.0f} GPU-hours, without trials that end early{drawn}", highlight=False)
