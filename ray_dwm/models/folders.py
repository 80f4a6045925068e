"""Models as folders, as far as that needs no transformers: a DWM's, which is config.json plus model.safetensors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ray_dwm.errors import DataError
from ray_dwm.models.dwm import DataWeightingModel, DwmShape

RUN_CONFIG = "ray_dwm_config.yaml"
"""In an LM folder that a run has written: the run's configuration."""


def lm_folder(folder: Path) -> Path:
    """Where the LM of a run folder or a Hugging Face folder lies."""
    return folder / "hf" if (folder / "hf").is_dir() else folder


def save_dwm(folder: Path, shape: DwmShape, state: dict[str, Tensor], provenance: dict[str, Any]) -> None:
    """Write a DWM folder; it appears whole or not at all.

    Args:
        provenance: tokenizer_sha256, version, and the LM and step it was learnt on.
    """
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    config = {"model_type": "ray_dwm", **shape.to_dict(), "features": shape.features, **provenance}
    (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file({k: v.contiguous() for k, v in state.items()}, temporary / "model.safetensors")
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


def newest_dwm(folder: Path) -> Path | None:
    """The last version in a run's dwm folder that is whole; None where there is none."""
    versions = sorted(path for path in folder.glob("v*") if path.suffix != ".tmp")
    return versions[-1] if versions else None


def load_dwm(folder: Path, tokenizer_sha256: str | None = None) -> tuple[DataWeightingModel, dict[str, Any]]:
    """Read a DWM folder.

    Args:
        tokenizer_sha256: refuse a DWM that was learnt with another tokenizer.

    Raises:
        DataError: missing, damaged, of other features or of another tokenizer.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        state = load_file(folder / "model.safetensors")
        shape = DwmShape(**{k: config[k] for k in DwmShape.__dataclass_fields__})
        model = DataWeightingModel(shape)
        model.load_state_dict(state)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(
            f"{folder} is not a readable DWM folder ({reason}): name one in a run's dwm folder, or an exported one"
        ) from None
    stored = config.get("features", shape.features)  # folders of before say nothing: there were no others
    if stored != shape.features:
        raise DataError(
            f"{folder} looks at {stored}, this version gives {shape.features}: use the version that learnt it"
        )
    if tokenizer_sha256 is not None and config.get("tokenizer_sha256") != tokenizer_sha256:
        raise DataError(
            f"{folder} was learnt with another tokenizer: prepare the data with that tokenizer, or learn anew"
        )
    return model, config
