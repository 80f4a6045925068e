"""The target sets of a selection."""

from __future__ import annotations

from ray_dwm.config import RunConfig
from ray_dwm.data.manifest import Manifest, load_manifest
from ray_dwm.errors import ConfigError, DataError

_LEAST = 8
"""Sequences below which a target set says nothing."""


def read_targets(config: RunConfig, pool: Manifest) -> dict[str, Manifest]:
    """Name -> target set, all of which a selection from the pool can be for.

    Raises:
        ConfigError, DataError: there is none, or one does not fit; naming the key or file and the remedy.
    """
    targets = {name: load_manifest(folder) for name, folder in config.data.target_sets.items()}
    if not targets:
        raise ConfigError(
            f"data.target is empty: selection by {config.data.selection} needs a target set, name a folder of token "
            "shards (--target)"
        )
    for name, target in targets.items():
        if target.tokenizer_sha256 != pool.tokenizer_sha256:
            raise DataError(
                f"{target.folder} (set {name}) was made with tokenizer {target.tokenizer_name}, the pool {pool.folder} "
                f"with {pool.tokenizer_name}, another one: prepare both with the same tokenizer"
            )
        if target.rows < _LEAST:
            raise DataError(
                f"{target.folder} (set {name}) has {target.rows} sequences: a selection needs at least {_LEAST}, "
                "prepare a larger target set"
            )
    return targets
