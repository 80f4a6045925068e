"""What a job takes along: its working folder, as Ray would pack it, and its runtime environment."""

from __future__ import annotations

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from ray._private import ray_constants
from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

from ray_dwm.errors import UserError

RUNTIME_ENV = "runtime_env.yaml"
MOST_BYTES = 100 * 2**20
"""Of a working folder. Ray's own limit is 512 MiB, but dashboards and proxies have refused 100 (ray#55877), and every
node fetches it through the head."""
_LARGEST = 5
_SILENT = logging.Logger("upload")
_SILENT.addHandler(logging.NullHandler())

Sizes = Mapping[Path, int]
"""File, relative to the working folder -> bytes."""


def read_runtime_env(file: Path) -> dict[str, Any]:
    """Ray's runtime environment from a YAML file.

    Raises:
        UserError: it cannot be read, is no mapping, or names a working folder of its own.
    """
    try:
        content = yaml.safe_load(file.read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"runtime environment {file} cannot be read ({reason}): mend it, or name another") from None
    if not isinstance(content, dict):
        raise UserError(f"runtime environment {file} must be a mapping, as env_vars: {{NAME: value}}")
    if "working_dir" in content:
        raise UserError(f"runtime environment {file} has a working_dir: remove it there, --working-dir names it")
    return content


def listing(folder: Path, excludes: Sequence[str] = ()) -> dict[Path, int]:
    """The files that Ray would upload, by Ray's own rules: .gitignore, .rayignore, what it never takes, and `excludes`.

    Raises:
        UserError: there is no such folder, or something in it cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"working folder {folder} does not exist: --working-dir names the source tree")
    folder, sizes = folder.absolute(), dict[Path, int]()

    def note(path: Path) -> None:
        if path.is_file():
            sizes[path.relative_to(folder)] = path.stat().st_size

    never = [*ray_constants.get_runtime_env_default_excludes(), *excludes]
    gitignore = os.environ.get(ray_constants.RAY_RUNTIME_ENV_IGNORE_GITIGNORE, "0") != "1"
    try:
        _dir_travel(folder, [_get_excludes(folder, never)], note, gitignore, _SILENT)
    except OSError as error:
        raise UserError(
            f"{error.filename} in the working folder cannot be read ({error.strerror}): name it in .rayignore"
        ) from None
    return sizes


def check_size(folder: Path, sizes: Sizes, most: int = MOST_BYTES) -> int:
    """Bytes of an upload; Ray stores them uncompressed.

    Raises:
        UserError: more than `most`, with what takes the most of it.
    """
    total = sum(sizes.values())
    if total > most:
        largest = ", ".join(f"{path} {_mib(size)}" for path, size in offenders(sizes))
        raise UserError(
            f"working folder {folder} would upload {_mib(total)}, at most {_mib(most)} are sensible; the largest are "
            f"{largest}: name in .rayignore what the job does not need, and put data on the shared storage"
        )
    return total


def offenders(sizes: Sizes) -> list[tuple[str, int]]:
    """The largest entries of the folder; where more than half of one is in one entry of its own, that one is named."""
    totals: Counter[Path] = Counter()
    inside: defaultdict[Path, set[Path]] = defaultdict(set)
    for file, size in sizes.items():
        for path in (file, *file.parents[:-1]):
            totals[path] += size
            inside[path.parent].add(path)
    found = []
    for path in inside[Path()]:
        while inside[path] and 2 * totals[(largest := max(inside[path], key=lambda p: totals[p]))] > totals[path]:
            path = largest
        found.append((f"{path}/" if inside[path] else str(path), totals[path]))
    return sorted(found, key=lambda row: -row[1])[:_LARGEST]


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
