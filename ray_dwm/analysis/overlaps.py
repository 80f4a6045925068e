"""Whether what runs are judged by was there to be learnt: looked for before a report, where that is soon done."""

from __future__ import annotations

from collections.abc import Sequence

from ray_dwm.analysis.runs import Run
from ray_dwm.data.manifest import MANIFEST, file_sha256, load_manifest
from ray_dwm.data.records import read_json
from ray_dwm.errors import DataError, DwmError
from ray_dwm.evaluation.contamination import Overlap, compare_sets, set_pairs
from ray_dwm.evaluation.scores import keep, read_overlaps
from ray_dwm.logs import say

MOST_TOKENS = 50_000_000
"""Of all sets of a run together, up to which they are compared unasked: one core reads as many in some 20 s."""


def look(runs: Sequence[Run]) -> None:
    """Compare the sets of each finished run, unless that is done, and keep what is found in its folder.

    Where it cannot be done, or would take long, that is said in a line; `unchecked` says it in the report.
    """
    found: dict[tuple[tuple[str, str], ...], list[Overlap]] = {}
    """Digests of a run's sets -> what they share: cells of an experiment have most of them in common."""
    left: list[str] = []
    for run in runs:
        if _is_compared(run):
            continue
        try:
            sets = tuple(_digests(run).items())
            if sets not in found:
                found[sets] = compare_sets(run.config.data, read_overlaps(run.folder))
            keep(run.folder, None, found[sets])
        except (DwmError, OSError) as error:
            left.append(f"{run.folder}: {error}")
    if left:
        say(f"contamination is not looked for in {len(left)} of {len(runs)} runs, as in {left[0]}")


def unchecked(runs: Sequence[Run]) -> list[str]:
    """What nobody has looked for in some run, or in any, as a page says it."""
    missing = sum(not _is_compared(run) for run in runs)
    if runs and not missing:
        return []
    return [f"contamination in {missing} of {len(runs)} runs" if missing < len(runs) else "contamination"]


def _is_compared(run: Run) -> bool:
    return set_pairs(run.config.data) <= {(of.what, of.against) for of in read_overlaps(run.folder)}


def _digests(run: Run) -> dict[str, str]:
    """Set -> SHA-256 of its manifest.

    Raises:
        DataError: a set is not there any more, or is another one, or they are too large.
    """
    data, digests, tokens = run.config.data, {}, 0
    recorded = read_json(path) if (path := run.folder / "data.json").is_file() else {}
    for name, folder in {"train": data.train, **data.evaluation_sets}.items():
        manifest = load_manifest(folder)
        digests[name] = file_sha256(manifest.folder / MANIFEST)
        if recorded.get(name, digests[name]) != digests[name]:
            raise DataError(f"the shards of {name} are not those that it was made with")
        tokens += manifest.rows * manifest.seq_len
    if tokens > MOST_TOKENS:
        raise DataError(f"its sets have {tokens:,} tokens, more than {MOST_TOKENS:,}")
    return digests
