"""The data card: what a run's sets hold, where they come from, and what selecting and weighing made of the domains."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ray_dwm.analysis.runs import Run
from ray_dwm.analysis.tables import Table
from ray_dwm.config.building import dotted
from ray_dwm.data.manifest import MANIFEST, Manifest, file_sha256, find_manifest
from ray_dwm.data.records import read_json
from ray_dwm.selection.record import RECORD

_LISTED = 12
"""Source files that are named; of more, how many there are."""


@dataclass(frozen=True, slots=True)
class SetCard:
    """One set of token shards."""

    name: str
    role: str
    state: str
    """What keeps the rest from being told, or from being that of the run; empty: nothing."""
    facts: tuple[tuple[str, str], ...]
    domains: Table | None


def data_card(run: Run) -> dict[str, Any]:
    """Sets, selections and stages of a run; what is not at hand any more is said to be so."""
    return data_cards([run])[0]


def data_cards(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """A card for each of the runs that has sets or stages which none before it has; a set is on one card only."""
    cards, known = [], set()
    for run in runs:
        recorded = read_json(path) if (path := run.folder / "data.json").is_file() else {}
        sets = []
        for name, role, folder in _sets(run):
            key = (name, role, recorded.get(name, run.folder))
            if key not in known or _in_stages(run, name):
                sets.append(_set_card(run, name, role, folder, recorded.get(name, "")))
            known.add(key)
        if sets:
            train = find_manifest(run.config.data.train) if sets[0].name == "train" else None
            selection = _selection(train) if train else None
            cards.append({"run": run.name, "sets": sets, "selection": selection, "stages": _stages(run)})
    return cards


def _in_stages(run: Run, name: str) -> bool:
    """Whether a set is one of which the run chose for itself, as no other run did."""
    return name == "train" and run.config.in_stages


def _sets(run: Run) -> Iterator[tuple[str, str, str]]:
    """(name, role, folder) of every set."""
    data = run.config.data
    yield "train", "the pool of which the stages were chosen" if run.config.in_stages else "trained on", data.train
    for name, folder in run.config.data.target_sets.items():
        yield name, "target set", folder
    for name, folder in data.held_out.items():
        yield name, "held out, only evaluated", folder


def _set_card(run: Run, name: str, role: str, folder: str, digest: str) -> SetCard:
    manifest = find_manifest(folder)
    if manifest is None:
        return SetCard(name, role, "its shards are not where they were", (), None)
    changed = digest not in ("", file_sha256(manifest.folder / MANIFEST))
    state = "its shards have been changed since the run: this is what they are now" if changed else ""
    weights = run.weights() if name == "train" and run.weighted else None
    tokens = manifest.rows * manifest.seq_len
    facts = [
        ("size", f"{manifest.rows:,} sequences of {manifest.seq_len:,} tokens, {tokens:,} tokens in all"),
        ("tokenizer", f"{manifest.tokenizer_name}, {manifest.vocab_size:,} entries ({manifest.tokenizer_sha256[:12]})"),
        *_provenance(manifest.made_by),
    ]
    if name == "train":
        facts.insert(1, ("read", "; ".join(f"{part}: {times:.2f} epochs" for part, times in passes(run))))
    return SetCard(name, role, state, tuple(facts), domain_table(manifest, weights))


def _provenance(made_by: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """What the manifest says of the shards' origin, whatever that is; a licence only where somebody has recorded it."""
    for name, value in dotted(made_by).items():
        key = name.replace("_", " ")
        if isinstance(value, list):
            named = ", ".join(map(str, value[:_LISTED]))
            yield key, named + (f" and {len(value) - _LISTED} more" if len(value) > _LISTED else "")
        else:
            yield key, f"{value:,}" if type(value) is int else str(value)
    if not any("licen" in key for key in made_by):
        yield "licence", "none is recorded in the manifest"


def domain_table(manifest: Manifest, weights: pa.Table | None) -> Table:
    """Domains, largest first, and what recorded weights made of them: `share of weight` is that of the LM's loss."""
    total = sum(stats.tokens for stats in manifest.domains.values())
    seen = _shares(weights) if weights is not None and weights.num_rows else {}
    header = ("domain", "sequences", "tokens", "share", "bytes/token")
    rows = []
    for name, of in sorted(manifest.domains.items(), key=lambda item: -item[1].tokens):
        cells = (name, f"{of.rows:,}", f"{of.tokens:,}", f"{of.tokens / total:.1%}", f"{of.bytes_per_token:.2f}")
        drawn = tuple(f"{part:.1%}" for part in seen.get(name, (0.0, 0.0))) if seen else ()
        rows.append(cells + drawn)
    return Table("Domains", header + (("share drawn", "share of weight") if seen else ()), tuple(rows), 1)


def _shares(weights: pa.Table) -> dict[str, tuple[float, float]]:
    """Domain -> its part of the recorded sequences, and of their weight."""
    found = weights.group_by("domain").aggregate([("weight", "count"), ("weight", "sum")]).to_pylist()
    rows, mass = weights.num_rows, sum(row["weight_sum"] for row in found)
    return {row["domain"]: (row["weight_count"] / rows, row["weight_sum"] / mass) for row in found}


def _selection(train: Manifest) -> dict[str, Any] | None:
    """What selected the shards, and what it did to each domain; None where nothing did."""
    path = train.folder / RECORD
    if not path.is_file():
        return None
    record = read_json(path)
    sequences = record["sequences"]
    return {
        "told": f"{record['method']} took {sequences['selected']:,} of {sequences['pool']:,} sequences",
        "options": dotted(dict(record["options"].get(record["method"]) or {})),
        "table": selected_domains(record),
    }


def selected_domains(record: Mapping[str, Any]) -> Table:
    """What a selection did to each domain, largest of the pool first."""
    rows = tuple(
        (
            name,
            f"{of['tokens_pool']:,}",
            f"{of['share_pool']:.1%}",
            f"{of['tokens_selected']:,}",
            f"{of['share_selected']:.1%}",
            f"{of['tokens_selected'] / of['tokens_pool']:.1%}" if of["tokens_pool"] else "",
        )
        for name, of in sorted(record["domains"].items(), key=lambda item: -item[1]["tokens_pool"])
    )
    header = ("domain", "pool, tokens", "share", "selected, tokens", "share", "taken")
    return Table("What selecting did to each domain", header, rows, 1)


def records_of_stages(run: Run) -> list[dict[str, Any]]:
    """What a run that chose its own data recorded of each stage, in order."""
    records = [read_json(path) for path in (run.folder / "stages").glob(f"*/{RECORD}")]
    return sorted(records, key=lambda record: int(record["stage"]))


def _stages(run: Run) -> list[Table]:
    """How each stage was chosen, and the share of every domain in it."""
    records = records_of_stages(run)
    if not records:
        return []
    rows = []
    for record in records:
        notes, sequences = record["notes"], record["sequences"]
        judged = (f"{notes['spearman']:.2f}", f"{notes['r2']:.2f}") if notes else ("", "")
        steps = f"{record['steps'][0] + 1} to {record['steps'][1]}"
        counts = (f"{sequences['selected']:,}", f"{sequences['pool']:,}", f"{record['chosen_before']:,}")
        rows.append((str(record["stage"]), record["method"], steps, *counts, *judged, f"{record['seconds']:.0f}"))
    header = ("stage", "chosen by", "steps", "sequences", "of", "chosen before", "Spearman", "R²", "seconds")
    domains = list(records[0]["domains"])
    shares = tuple(
        (
            name,
            f"{records[0]['domains'][name]['share_pool']:.1%}",
            *(f"{record['domains'][name]['share_selected']:.1%}" for record in records),
        )
        for name in domains
    )
    of_stages = tuple(f"stage {record['stage']}" for record in records)
    return [
        Table("Stages", header, tuple(rows), 3),
        Table("Share of each domain", ("domain", "candidates", *of_stages), shares, 1),
    ]


def passes(run: Run) -> list[tuple[str, float]]:
    """(part of training, how often it read its sequences); without what is not at hand any more."""
    batch = run.config.train.global_batch
    if run.config.in_stages:
        return [
            (f"stage {of['stage']}", (of["steps"][1] - of["steps"][0]) * batch / of["sequences"]["selected"])
            for of in records_of_stages(run)
        ]
    train = find_manifest(run.config.data.train)
    return [("the run", run.summary["steps"] * batch / train.rows)] if train else []
