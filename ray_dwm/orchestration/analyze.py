"""The analysis of runs as a job: what each weighting preferred, measured on Ray Data, and the report of all runs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray_dwm.analysis.overlaps import look
from ray_dwm.analysis.preferences import SAMPLES, Asked, preferences, take_sample
from ray_dwm.analysis.report import write_report
from ray_dwm.analysis.runs import Run, open_runs, versions
from ray_dwm.config import RunConfig, load
from ray_dwm.data.manifest import MANIFEST, file_sha256, load_manifest
from ray_dwm.data.records import read_json, write_whole
from ray_dwm.errors import DataError, UserError
from ray_dwm.logs import say
from ray_dwm.orchestration.cluster import connect
from ray_dwm.orchestration.proxies import named_lm
from ray_dwm.orchestration.sweep import RaySweep
from ray_dwm.orchestration.work import work_folder

FILE = "preferences.json"
_FORMAT = 1
_FREE = "selection."


@dataclass(frozen=True, kw_only=True, slots=True)
class Analysis:
    """What is asked of `analyze`."""

    output: Path
    samples: int = SAMPLES
    seed: int = 0
    reference: str = ""
    """A run folder or Hugging Face folder, or `none`; empty: the run with uniform weights on the same data, if any."""
    preferences: bool = True
    numbers: Path | None = None
    """JSON file of all runs' numbers."""
    overrides: tuple[str, ...] = ()
    """Of section `selection`: how the work is cut and placed."""


def apart(named: Sequence[str]) -> tuple[list[Path], tuple[str, ...]]:
    """Run folders and overrides, as the console has them side by side.

    Raises:
        UserError: no folder is among them.
    """
    overrides = tuple(name for name in named if "=" in name and not Path(name).exists())
    if len(overrides) == len(named):
        raise UserError("no run folder is named: ray-dwm analyze RUN...")
    return [Path(name) for name in named if name not in overrides], overrides


def analyze(folders: Sequence[Path], asked: Analysis) -> None:
    """Write the report of runs, after the preferences of those with weights have been measured or found.

    Raises:
        UserError: naming folder, file or option and the remedy; no report is written.
    """
    runs = open_runs(folders)
    weighted = [run for run in runs if run.weighted]
    if asked.numbers is not None and not (weighted and asked.preferences):
        raise UserError("--json writes what weightings preferred, and none is looked at: name a run with weights")
    found: dict[Path, dict[str, Any] | str] = {}
    if asked.preferences:
        for run in weighted:
            found[run.folder] = preferences_of(run, asked, _reference(run, runs, asked.reference))
    look(runs)
    write_report(list(folders), asked.output, found)
    if asked.numbers is not None:
        write_whole(asked.numbers.absolute(), json.dumps({str(run): of for run, of in found.items()}, indent=2) + "\n")


def _reference(run: Run, runs: Sequence[Run], named: str) -> str:
    """The folder of the reference LM of a run; empty: none."""
    if named:
        return "" if named == "none" else named
    partners = (other for other in runs if not other.weighted and other.config.data.train == run.config.data.train)
    return next((str(partner.folder) for partner in partners if (partner.folder / "hf").is_dir()), "")


def preferences_of(run: Run, asked: Analysis, reference: str = "") -> dict[str, Any]:
    """The preferences of a weighted run: from its preferences.json if that is of the same, else measured and kept.

    Args:
        reference: folder of the reference LM; empty: none.

    Raises:
        UserError: naming folder, file or option and the remedy; nothing is written.
    """
    config, pool = _placed(run, asked.overrides), load_manifest(run.config.data.train)
    lm = named_lm(Path(reference), pool, "--reference") if reference else None
    depends_on = {
        "format": _FORMAT,
        "samples": asked.samples,
        "seed": asked.seed,
        "reference": lm.digest if lm else "",
        "files": _files(run),
    }
    path = run.folder / FILE
    if path.is_file() and (kept := read_json(path)).get("depends_on") == depends_on:
        say(f"preferences are there already: {path}", run=run.name)
        return kept
    batch = config.selection.proxy.batch
    wanted = Asked(
        samples=asked.samples, seed=asked.seed, reference=str(lm.folder) if lm else "", reference_batch=batch
    )
    take_sample(run, wanted)
    connect(config)
    with work_folder(path.absolute(), depends_on) as work:
        sweep = RaySweep(work, config.selection, f"[{run.name}] ")
        numbers = preferences(run, wanted, sweep)
        content = {"depends_on": depends_on, "versions": versions(), "reference": reference, **numbers}
        write_whole(path, json.dumps(content, indent=2, allow_nan=False) + "\n")
    return content


def _placed(run: Run, overrides: Sequence[str]) -> RunConfig:
    """The run's configuration with the work cut and placed as asked."""
    for override in overrides:
        if not override.startswith(_FREE):
            raise UserError(f"{override}: of a finished run only {_FREE}* can be set, as selection.tasks=4")
    return load([run.folder / "config.yaml"], overrides)


def _files(run: Run) -> dict[str, str]:
    """Everything that the numbers are made of -> its SHA-256.

    Raises:
        DataError: the shards are not those that the run was made with.
    """
    sets = {"train": run.config.data.train, **run.config.data.target_sets}
    digests = {name: file_sha256(load_manifest(folder).folder / MANIFEST) for name, folder in sets.items()}
    recorded: Mapping[str, str] = read_json(path) if (path := run.folder / "data.json").is_file() else {}
    for name, digest in digests.items():
        if recorded.get(name, digest) != digest:
            raise DataError(f"the shards of {name} are not those that {run.folder} was made with: restore {sets[name]}")
    dwm = run.config.dwm
    given = [Path(folder).expanduser() for folder in (dwm.init_from, dwm.trajectory) if folder]
    files = [run.folder / "config.yaml", *sorted((run.folder / "weights").glob("*.parquet"))]
    files += [path for folder in (run.folder / "dwm", *given) for path in sorted(folder.rglob("*.safetensors"))]
    of_run = {path: str(path.relative_to(run.folder) if path.is_relative_to(run.folder) else path) for path in files}
    return digests | {name: file_sha256(path) for path, name in of_run.items()}
