"""The commands that look ahead: doctor, plan."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Annotated, Any

import typer

from ray_dwm.cli.options import Config, Overrides, load_config
from ray_dwm.logs import width
from ray_dwm.planning.options import number, whole


def _number(help: str, parser: Callable[[str], float]) -> Any:
    return typer.Option(help=help, parser=parser, metavar="NUMBER")


# Parsed by us, not by the console's own types: one line that names the remedy, in place of a box with the usage.
Gpus = Annotated[
    int | None, _number("GPUs, one for each worker.", whole("--gpus", "as many as cluster.workers", 1, 2**20))
]
Mfu = Annotated[float | None, _number("MFU to assume.", number("--mfu", "a published one", most=1))]
Price = Annotated[float | None, _number("Of a GPU-hour.", number("--price", "no cost"))]
Vocab = Annotated[
    int | None,
    _number("Vocabulary, where there are no shards yet.", whole("--vocab", "that of the presets", 2, 2**31 - 1)),
]
Network = Annotated[
    float | None,
    _number("Gb/s between nodes for each GPU.", number("--network-gbps", "that of the vendor's own systems")),
]
HostMemory = Annotated[
    float | None,
    _number("GB of a node's host memory.", number("--host-memory-gb", "that of the vendor's own systems")),
]


def doctor(
    config: Config = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Check whatever would make a run fail, before it starts; exit code 2 where something would."""
    from rich.console import Console

    from ray_dwm.orchestration.doctor import Doctor
    from ray_dwm.orchestration.findings import has_failed, show, to_json

    given = load_config(config, overrides) if config or overrides else None
    # Ray prints what its nodes have to say; standard output is for the rows alone.
    with redirect_stdout(sys.stderr), Console(stderr=True).status("doctor") as status:
        findings = Doctor(given, lambda name: status.update(f"checking {name}")).examine()
    if as_json:
        typer.echo(to_json(findings))
    else:
        show(findings, Console(width=width(160)))
    raise typer.Exit(2 if has_failed(findings) else 0)


def plan(
    config: Config = None,
    overrides: Overrides = None,
    gpus: Gpus = None,
    gpu: Annotated[str, typer.Option(help="Kind of GPU, as h100 or a100-40g.")] = "h100",
    mfu: Mfu = None,
    price: Price = None,
    vocab: Vocab = None,
    network_gbps: Network = None,
    host_memory_gb: HostMemory = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in bytes and seconds.")] = False,
) -> None:
    """Say what a run will need before it is started: memory, time, communication, cost, and the cheapest layout."""
    from ray_dwm.planning import plan as planning
    from ray_dwm.planning import table

    run_config, refused = planning.on_gpus(config or [], overrides or [], gpus or 0)
    found = planning.plan(
        run_config,
        gpu,
        mfu=mfu or 0.0,
        price=price or 0.0,
        vocab=vocab or 0,
        network_gbps=network_gbps or 0.0,
        host_memory_gb=host_memory_gb or 0.0,
        refused=refused,
    )
    if as_json:
        typer.echo(json.dumps(table.as_json(found), indent=2))
    else:
        table.show(found)
