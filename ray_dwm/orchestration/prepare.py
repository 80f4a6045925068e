"""Text to token shards as a Ray Data pipeline: one task per input file, the same output for any parallelism."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import ray

from ray_dwm.config import PrepareConfig, RunConfig
from ray_dwm.data.manifest import DomainStats, Manifest, ShardFile, load_manifest
from ray_dwm.data.packing import pack_file
from ray_dwm.data.text import find_files
from ray_dwm.data.tokenization import FOLDER, Tokenizer, copy_tokenizer
from ray_dwm.errors import DataError, DwmError, UserError
from ray_dwm.logs import say
from ray_dwm.orchestration.cluster import connect

REJECTS = "rejects.jsonl"


def sets_to_prepare(config: RunConfig) -> list[tuple[str, str, str]]:
    """(configuration key, files, output folder) of every set whose text the configuration names."""
    p, d = config.prepare, config.data
    sets = [("prepare.train", p.train, d.train), ("prepare.target", p.target, d.target)]
    for section, texts, folders in (
        ("more_targets", p.more_targets, d.more_targets),
        ("held_out", p.held_out, d.held_out),
    ):
        for name, files in texts.items():
            if name not in folders:
                raise UserError(f"prepare.{section}.{name} has no output folder: add data.{section}.{name}")
            sets.append((f"prepare.{section}.{name}", files, folders[name]))
    return [(key, files, output) for key, files, output in sets if files and output]


def sets_to_make(config: RunConfig, *, missing_only: bool) -> list[tuple[str, str, str]]:
    """Those of `sets_to_prepare` that `prepare_sets` makes, after it has checked that they can be made.

    Raises:
        UserError: bad input, naming the key or file.
    """
    sets = sets_to_prepare(config)
    if missing_only:
        sets = [row for row in sets if not Path(row[2]).expanduser().exists()]
    elif not sets:
        raise UserError("nothing to prepare: set prepare.train and data.train (files, and the folder for their shards)")
    outputs = [Path(output).expanduser().absolute() for _, _, output in sets]
    if len(set(outputs)) < len(outputs):
        raise UserError("two sets have the same output folder: give each data.* a folder of its own")
    for row in sets:
        _check(*row, config.prepare)
    return sets


def prepare_sets(config: RunConfig, *, missing_only: bool = False) -> None:
    """Prepare the sets whose text the configuration names, all checked before Ray is started.

    Args:
        missing_only: leave out the sets whose folder exists, instead of refusing them.
    """
    sets = sets_to_make(config, missing_only=missing_only)
    if sets:
        connect(config)
    for row in sets:
        manifest = prepare(*row, config.prepare)
        counts = ", ".join(f"{name} {stats.rows}" for name, stats in manifest.domains.items())
        rejected = manifest.made_by["rejected_records"]
        say(f"{row[2]}: {manifest.rows} sequences of {manifest.seq_len} tokens ({counts}), {rejected} records rejected")


def _check(key: str, files: str, output: str | Path, config: PrepareConfig) -> tuple[list[Path], Tokenizer, Path]:
    """(sources, tokenizer, folder) of a set that can be prepared."""
    sources, tokenizer = find_files(files, key), Tokenizer(config.tokenizer)
    folder = Path(output).expanduser().absolute()
    if folder.exists():
        raise UserError(f"{folder} exists already: remove it to prepare it anew")
    return sources, tokenizer, folder


def prepare(key: str, files: str, output: str | Path, config: PrepareConfig) -> Manifest:
    """Tokenise and pack one set; the output folder appears whole or not at all. Ray must be connected.

    Raises:
        UserError: bad input, naming the file; nothing is left behind.
    """
    sources, tokenizer, folder = _check(key, files, output, config)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        temporary.chmod(0o755)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): choose another folder") from None
    try:
        reports = _pack_all(sources, temporary, config)
        manifest = _manifest(reports, temporary, tokenizer, config, sources)
        manifest.write()
        copy_tokenizer(Path(config.tokenizer).expanduser(), temporary / FOLDER)
        _write_rejects(reports, temporary)
        os.rename(temporary, folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"{folder} cannot be written ({error.strerror}): nothing is left behind") from None
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return load_manifest(folder)


def _pack_all(sources: Sequence[Path], output: Path, config: PrepareConfig) -> list[dict[str, Any]]:
    """One report per source, in the sources' order."""
    options = {
        "tokenizer": str(Path(config.tokenizer).expanduser().absolute()),
        "output": str(output),
        "seq_len": config.seq_len,
        "rows_per_file": config.rows_per_file,
        "domain_field": config.domain_field,
    }
    items = [{"number": number, "source": str(source)} for number, source in enumerate(sources)]
    packed = ray.data.from_items(items, override_num_blocks=len(items)).map(
        _pack_one, fn_kwargs=options, compute=ray.data.TaskPoolStrategy(size=min(config.workers, len(items)))
    )
    reports = sorted((json.loads(row["report"]) for row in packed.take_all()), key=lambda r: int(r["number"]))
    for report in reports:
        if "error" in report:
            raise DataError(report["error"])
    return reports


@lru_cache(maxsize=2)
def _tokenizer(folder: str) -> Tokenizer:
    return Tokenizer(folder)


def _pack_one(row: dict[str, Any], tokenizer: str, output: str, **options: Any) -> dict[str, Any]:
    # A damaged file travels back as data: an exception would be wrapped and retried by Ray.
    try:
        report = pack_file(Path(row["source"]), int(row["number"]), Path(output), _tokenizer(tokenizer), **options)
        content = {"number": int(row["number"]), **report.to_dict()}
    except (DwmError, OSError) as error:
        content = {"number": int(row["number"]), "error": str(error)}
    return {"report": json.dumps(content)}


def _manifest(
    reports: list[dict[str, Any]],
    folder: Path,
    tokenizer: Tokenizer,
    config: PrepareConfig,
    sources: Sequence[Path],
) -> Manifest:
    totals: dict[str, dict[str, int]] = {name: {} for name in ("rows", "tokens", "text_bytes")}
    for report in reports:
        for name, counts in totals.items():
            for domain, count in report[name].items():
                counts[domain] = counts.get(domain, 0) + count
    if not totals["rows"]:
        raise DataError(f"{sources[0].parent} holds no usable record: each needs a field `text` of type string")
    for domain, rows in totals["rows"].items():
        if rows == 0:
            raise DataError(
                f"domain {domain} has {totals['tokens'][domain]} tokens, less than prepare.seq_len = {config.seq_len}: "
                "leave it out, add text or shorten the sequences"
            )
    return Manifest(
        folder=folder,
        seq_len=config.seq_len,
        vocab_size=tokenizer.vocab_size,
        eos_token_id=tokenizer.eos_token_id,
        tokenizer_name=tokenizer.name,
        tokenizer_sha256=tokenizer.sha256,
        files=tuple(ShardFile(**file) for report in reports for file in report["shards"]),
        domains={
            domain: DomainStats(
                rows=rows,
                tokens=rows * config.seq_len,
                bytes_per_token=totals["text_bytes"][domain] / totals["tokens"][domain],
            )
            for domain, rows in sorted(totals["rows"].items())
        },
        made_by={
            "command": "prepare",
            "sources": [source.name for source in sources],
            "documents": sum(report["documents"] for report in reports),
            "rejected_records": sum(len(report["rejects"]) for report in reports),
            "dropped_tokens": sum(report["dropped_tokens"] for report in reports),
            **{k: v for k, v in asdict(config).items() if k in ("domain_field", "rows_per_file")},
        },
    )


def _write_rejects(reports: list[dict[str, Any]], folder: Path) -> None:
    rejects = [reject for report in reports for reject in report["rejects"]]
    if rejects:
        lines = "".join(json.dumps({**reject, "file": Path(reject["file"]).name}) + "\n" for reject in rejects)
        (folder / REJECTS).write_text(lines)
