"""What the commands' options have in common."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ray_dwm.config import RunConfig, load
from ray_dwm.errors import UserError
from ray_dwm.logs import setup, style_of

Config = Annotated[
    list[Path] | None,
    typer.Option("--config", help="YAML file with what differs from the defaults; a further one goes over it."),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Dotted overrides: train.steps=200 dwm.size=s", metavar="KEY=VALUE")
]


def check_output(output: Path | None, option: str = "--output") -> None:
    """An output file is refused before the work, not after it."""
    if output is None:
        return
    folder = output.absolute().parent
    if output.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{option} {output} cannot be written: name a file in a folder that exists")


def load_config(config: list[Path] | None, overrides: list[str] | None) -> RunConfig:
    """The configuration of files, with the overrides over them; it also says in which style the process speaks."""
    loaded = load(config or [], overrides or [])
    setup(style_of(loaded.tracking.logs))
    return loaded


def words(text: str) -> list[str]:
    """The words of a list with commas, as `random,dsir`."""
    return [word for part in text.split(",") if (word := part.strip())]
