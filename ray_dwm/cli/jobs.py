"""The command that hands another one to a cluster: submit."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

SETTINGS = {"ignore_unknown_options": True, "allow_interspersed_args": False}
"""What follows JOB is the job's, options too."""


def submit(
    job: Annotated[str, typer.Argument(help="A file of jobs/, as train; options of `submit` go before it.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="What `ray-dwm JOB` takes.")] = None,
    address: Annotated[
        str, typer.Option(help="Job server, as http://HEAD:8265. Default: RAY_API_SERVER_ADDRESS, or this machine's.")
    ] = "",
    working_dir: Annotated[Path, typer.Option(help="Source tree that the job runs in.")] = Path(),
    runtime_env: Annotated[
        Path | None, typer.Option(help="YAML file. Default: runtime_env.yaml of the source tree.")
    ] = None,
    wait: Annotated[bool, typer.Option(help="Follow the job's log and end with its exit code.")] = True,
) -> None:
    """Run a command as a Ray job: one name for the same work, its log here, its exit code at the end."""
    from ray_dwm.orchestration.submit import Request
    from ray_dwm.orchestration.submit import submit as run

    request = Request(job, arguments or [], working_dir, runtime_env, address, wait)
    raise typer.Exit(run(request))
