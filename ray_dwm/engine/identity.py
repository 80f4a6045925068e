"""What a checkpoint is of: a small file in it that says so, and the comparison before it is loaded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ray_dwm import __version__
from ray_dwm.config import RunConfig
from ray_dwm.data.manifest import Manifest
from ray_dwm.errors import ConfigError
from ray_dwm.models.dwm import dwm_shape
from ray_dwm.models.presets import lm_shape

IDENTITY = "identity.json"
Identity = Mapping[str, Any]


def run_identity(config: RunConfig, train: Manifest) -> dict[str, Any]:
    """What must be the same for a checkpoint to be continued, by dotted names."""
    found: dict[str, Any] = {f"lm.{key}": value for key, value in asdict(lm_shape(config.lm.preset)).items()}
    found["lm.vocabulary"] = train.vocab_size
    found["tokenizer"] = train.tokenizer_sha256
    found["train.optimizer"] = config.train.optimizer
    found["weighting.method"] = config.weighting.method
    if config.learns_dwm:
        shape = dwm_shape(config.dwm.size, train.vocab_size, config.dwm.lm_features, config.dwm.batch_attention)
        found |= {f"dwm.{key}": value for key, value in shape.to_dict().items()}
    return found


def write_identity(checkpoint: Path, identity: Identity, mesh: Mapping[str, int]) -> None:
    """Put it into a checkpoint, with what made it; `mesh` has the size of every dimension, for information."""
    made_by = {"ray_dwm": __version__, "mesh": dict(mesh)}
    (checkpoint / IDENTITY).write_text(json.dumps({"identity": dict(identity), "made_by": made_by}, indent=2) + "\n")


def difference(checkpoint: Path, identity: Identity) -> str | None:
    """The first thing that differs; a file that cannot be read does not say, and is damage."""
    stored = read_identity(checkpoint)
    if stored is None:
        return None
    for key in (*identity, *(key for key in stored if key not in identity)):
        if stored.get(key) != identity.get(key):
            return f"{key} is {stored.get(key)} there and {identity.get(key)} here"
    return None


def foreign(checkpoint: Path, reason: str) -> ConfigError:
    """What to say of a checkpoint that is not of this run."""
    return ConfigError(
        f"checkpoint {checkpoint} is of another run ({reason}): choose another name=..., or remove "
        f"{checkpoint.parent} to start anew"
    )


def read_identity(checkpoint: Path) -> dict[str, Any] | None:
    """What a checkpoint is of; None where the file is missing or garbled."""
    try:
        return dict(json.loads((checkpoint / IDENTITY).read_text())["identity"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
