"""A finished run's LM and DWM as a folder of their own."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from ray_dwm.errors import UserError
from ray_dwm.models.folders import newest_dwm


def export_run(run: Path, output: Path) -> None:
    """Copy hf/ to output/lm and the newest DWM version, if there is one, to output/dwm.

    Raises:
        UserError: the run is not finished, or the output exists.
    """
    if not (run / "summary.json").is_file() or not (run / "hf").is_dir():
        raise UserError(f"{run} is no finished run folder: let `ray-dwm train` end first")
    if output.exists() or output.is_symlink():
        raise UserError(f"{output} exists already: name a new folder")
    output = output.absolute()
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as name:
            whole = Path(name) / "export"
            shutil.copytree(run / "hf", whole / "lm")
            if (dwm := newest_dwm(run / "dwm")) is not None:
                shutil.copytree(dwm, whole / "dwm")
            whole.rename(output)
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror or error}): choose another folder") from None
