"""manifest.json: what a folder of token shards holds, and how to tell that it still does."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ray_dwm.errors import DataError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardFile:
    """One Arrow file of a folder."""

    name: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainStats:
    """What the folder holds of one domain. `bytes_per_token` (UTF-8 bytes of text) turns nats into bits-per-byte."""

    rows: int
    tokens: int
    bytes_per_token: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """Contents of a manifest.json; rows are numbered through all files in the order listed."""

    folder: Path
    seq_len: int
    vocab_size: int
    eos_token_id: int
    tokenizer_name: str
    tokenizer_sha256: str
    files: tuple[ShardFile, ...]
    domains: dict[str, DomainStats]
    made_by: dict[str, Any]

    @property
    def rows(self) -> int:
        """Sequences in all files."""
        return sum(file.rows for file in self.files)

    @property
    def rows_per_file(self) -> tuple[int, ...]:
        """Rows of each file."""
        return tuple(file.rows for file in self.files)

    @property
    def domain_names(self) -> list[str]:
        """Domains in the order of their integer codes."""
        return sorted(self.domains)

    def write(self) -> None:
        """Write manifest.json into its folder."""
        content = asdict(self)
        del content["folder"]
        content = {"format_version": FORMAT_VERSION, **content}
        (self.folder / MANIFEST).write_text(json.dumps(content, indent=2) + "\n")


def find_manifest(folder: str | Path) -> Manifest | None:
    """See `load_manifest`; None where no folder is named, or the shards have not been made yet."""
    there = bool(folder) and (Path(folder).expanduser() / MANIFEST).is_file()
    return load_manifest(folder) if there else None


def load_manifest(folder: str | Path) -> Manifest:
    """Read a folder's manifest and check it against the files' presence and sizes.

    Raises:
        DataError: naming the file and the remedy.
    """
    folder = Path(folder).expanduser().absolute()
    path = folder / MANIFEST
    if not path.is_file():
        raise DataError(
            f"{folder} holds no {MANIFEST}: it is no folder of token shards, make one with `ray-dwm prepare`"
        )
    try:
        content = json.loads(path.read_text())
        version = content.pop("format_version")
        if version != FORMAT_VERSION:
            raise DataError(f"{path} has format version {version}, this program reads {FORMAT_VERSION}: prepare anew")
        content["files"] = tuple(ShardFile(**file) for file in content["files"])
        content["domains"] = {name: DomainStats(**stats) for name, stats in content["domains"].items()}
        manifest = Manifest(folder=folder, **content)
        _check_types(manifest)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged ({error}): prepare the folder anew") from None
    for file in manifest.files:
        _check_size(folder / file.name, file)
    for name, stats in manifest.domains.items():
        if stats.rows == 0:
            raise DataError(f"{path}: domain {name} is empty: remove its source or give it at least one sequence")
    if manifest.rows == 0:
        raise DataError(f"{path} lists no sequences: prepare the folder anew")
    return manifest


def _check_types(manifest: Manifest) -> None:
    numbers = [manifest.seq_len, manifest.vocab_size, manifest.eos_token_id]
    numbers += [n for file in manifest.files for n in (file.rows, file.bytes)]
    numbers += [n for stats in manifest.domains.values() for n in (stats.rows, stats.tokens)]
    if not all(type(n) is int and n >= 0 for n in numbers) or not 0 <= manifest.eos_token_id < manifest.vocab_size:
        raise ValueError("a count is not a whole number, or the end-of-sequence token lies outside the vocabulary")


def _check_size(path: Path, file: ShardFile) -> None:
    if not path.is_file():
        raise DataError(f"shard {path} is missing, though the manifest lists it: restore it or prepare anew")
    size = path.stat().st_size
    if size != file.bytes:
        raise DataError(
            f"shard {path} has {size} bytes, the manifest says {file.bytes}: it was cut or replaced, prepare anew"
        )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file as a hexadecimal string."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
