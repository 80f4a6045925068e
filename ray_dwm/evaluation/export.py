"""A finished run's LM and DWM as a folder of their own."""

from __future__ import annotations

import shutil
from pathlib import Path

from ray_dwm.errors import UserError


def export_run(run: Path, output: Path) -> None:
    """Copy hf/ to output/lm and the newest DWM version, if there is one, to output/dwm.

    Raises:
        UserError: the run is not finished, or the output exists.
    """
    if not (run / "summary.json").is_file() or not (run / "hf").is_dir():
        raise UserError(f"{run} is no finished run folder: let `ray-dwm train` end first")
    if output.exists():
        raise UserError(f"{output} exists already: name a new folder")
    temporary = output.with_name(output.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(run / "hf", temporary / "lm")
    versions = sorted((run / "dwm").glob("v*"))
    if versions:
        shutil.copytree(versions[-1], temporary / "dwm")
    temporary.rename(output)
