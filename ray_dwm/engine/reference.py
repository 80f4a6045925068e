"""The frozen reference LM, over whose losses excess is taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ray_dwm.config import RunConfig
from ray_dwm.data.manifest import Manifest, file_sha256
from ray_dwm.data.records import read_json
from ray_dwm.errors import DataError
from ray_dwm.models.folders import lm_folder


def reference_folder(config: RunConfig) -> Path | None:
    """Where it lies; None where the run has none."""
    dro = config.weighting.group_dro
    if config.weighting.method != "group_dro" or not dro.reference:
        return None
    return lm_folder(Path(dro.reference).expanduser())


def reference_weights(config: RunConfig) -> Path | None:
    """A file that tells one reference LM from another; None where the run has none."""
    folder = reference_folder(config)
    return None if folder is None else next(iter(sorted(folder.glob("*.safetensors"))), folder / "config.json")


def check_reference(config: RunConfig, train: Manifest, seq_len: int) -> None:
    """Whether the reference LM reads the training set; loads nothing.

    Raises:
        DataError: there is none, or it is of another kind, tokenizer, vocabulary or context.
    """
    folder = reference_folder(config)
    if folder is None:
        return
    if not (folder / "config.json").is_file():
        raise DataError(
            f"weighting.group_dro.reference={folder} is neither a finished run nor a Hugging Face folder: name one"
        )
    found: dict[str, Any] = read_json(folder / "config.json")
    if found.get("model_type") != "llama":
        raise DataError(f"reference LM {folder} is of type {found.get('model_type')}: name the folder of a Llama")
    tokenizer = folder / "tokenizer.json"
    if tokenizer.is_file() and file_sha256(tokenizer) != train.tokenizer_sha256:
        raise DataError(
            f"reference LM {folder} was trained with another tokenizer than {train.folder} ({train.tokenizer_name}): "
            "name one of the same tokenizer"
        )
    for key, least in (("vocab_size", train.vocab_size), ("max_position_embeddings", seq_len)):
        if int(found.get(key) or 0) < least:
            raise DataError(
                f"reference LM {folder} has {key} = {found.get(key)}, {train.folder} needs {least}: name another LM"
            )
