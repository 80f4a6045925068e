"""The console: parse, load the configuration, make one call. Exit codes: 0 done, 1 the run failed, 2 wrong input."""

from __future__ import annotations

import os
import sys

import typer

from ray_dwm.cli.beforehand import doctor, plan
from ray_dwm.cli.data import prepare, score, select
from ray_dwm.cli.jobs import SETTINGS, submit
from ray_dwm.cli.results import analyze, evaluate, export
from ray_dwm.cli.training import compare, experiment, train, tune
from ray_dwm.errors import DwmError
from ray_dwm.logs import record, setup, style_of

COMMANDS = (prepare, select, score, train, doctor, evaluate, export, analyze, plan, compare, experiment, tune)
"""In the order in which `--help` names them."""

app = typer.Typer(
    help="Pre-train LMs with a learned Data Weighting Model on Ray.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for command in COMMANDS:
    app.command()(command)
app.command(context_settings=SETTINGS)(submit)


def main() -> None:
    """Console entry point: one clear line instead of a traceback where this package raised the error."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched unasked; read once, when the libraries come in
    setup(style_of("auto"))
    try:
        app()
    except DwmError as error:
        record(str(error), error, exit_code=error.exit_code)
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # as of `| head`: nobody is left to be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
