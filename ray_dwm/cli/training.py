"""The commands that train: train, compare, experiment, tune."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ray_dwm.cli.options import Config, Overrides, load_config, words
from ray_dwm.errors import UserError
from ray_dwm.logs import say
from ray_dwm.planning.options import whole


def train(config: Config = None, overrides: Overrides = None) -> None:
    """Train an LM, with the weights that weighting.method names; the same command resumes."""
    from ray_dwm.orchestration.train import train as run

    run_config = load_config(config, overrides)
    summary = run(run_config)
    for name, value in summary["final"].items():
        say(f"{name} {value:.4f}")
    say(f"done: {run_config.run_dir}", run=run_config.name, **summary["final"])


def compare(config: Config = None, overrides: Overrides = None) -> None:
    """Train with uniform weights and as configured, with equal data, seed and tokens; evaluate, report, verdict."""
    from ray_dwm.orchestration.compare import compare as run

    typer.echo(run(load_config(config, overrides)))


def experiment(
    file: Annotated[Path, typer.Argument(help="What is compared: methods, seeds, sizes (docs/experiments.md).")],
    overrides: Overrides = None,
    methods: Annotated[str, typer.Option(help="Only these, as random,dsir, and what they need.")] = "",
    seeds: Annotated[str, typer.Option(help="Only these, as 0,1.")] = "",
    parallel: Annotated[int, typer.Option(min=1, help="Cells at once, where the cluster has room.")] = 1,
    reuse: Annotated[
        str,
        typer.Option(help="Another experiment's folder: its finished runs are copied where they are configured alike."),
    ] = "",
    only_table: Annotated[
        bool, typer.Option("--only-table", help="Run nothing: the leaderboard of what is done.")
    ] = False,
    cell: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Train every cell of a declared grid and write a leaderboard; the same command continues."""
    from ray_dwm.analysis.publish import LEADERBOARD
    from ray_dwm.config.experiment import load_experiment
    from ray_dwm.orchestration import experiment as job

    config = load_experiment(file, overrides or [])
    if cell:
        raise typer.Exit(0 if job.one_cell(config, cell) else 1)
    if only_table:
        board = job.table(config)
    else:
        seed = whole("--seeds", "all of them", 0, 2**63 - 1)
        chosen = job.choose(config, words(methods), [seed(word) for word in words(seeds)])
        board = job.experiment(config, chosen, parallel=parallel, reuse=Path(reuse) if reuse else None)
    for line in (*board.verdict, *board.notes):
        typer.echo(f"- {line}")
    typer.echo(f"leaderboard: {config.folder / LEADERBOARD}.md, .json, .html")


def tune(
    config: Annotated[Path, typer.Option(help="What is searched, at which scales (docs/tune.md).")],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Start nothing: the space, what a trial asks for, the plan of all trials.")
    ] = False,
    gpu: Annotated[str, typer.Option(help="Kind of GPU that --dry-run plans with, as h100 or a100-40g.")] = "h100",
) -> None:
    """Search hyper-parameters by Ray Tune and Optuna, and carry the best to larger LMs; the same command continues."""
    from ray_dwm.config.tune import load_tune

    try:
        from ray_dwm.orchestration import tune as job
        from ray_dwm.orchestration import tune_plan
    except ModuleNotFoundError as error:
        raise UserError(f"{error.name} is not installed: pip install 'ray-dwm[tune]'") from None
    declared = load_tune(config, overrides or [])
    if dry_run:
        tune_plan.show(job.check(declared, prepare=False), gpu)
        return
    found = job.tune(declared)
    for line in found.lines:
        typer.echo(f"- {line}")
    typer.echo(f"report: {found.folder / 'report'}.md, .json, .html; {found.folder / 'recommended.yaml'}")
