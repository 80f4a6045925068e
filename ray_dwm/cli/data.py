"""The commands that make token shards: prepare, select, score."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, get_args

import typer

from ray_dwm.cli.options import Config, Overrides, load_config
from ray_dwm.config.selection import MethodName
from ray_dwm.errors import UserError

SELECTIONS = get_args(MethodName)[1:]  # but for `none`


def prepare(config: Config = None, overrides: Overrides = None) -> None:
    """Turn text into packed token shards (the prepare section says which)."""
    from ray_dwm.orchestration.prepare import prepare_sets

    prepare_sets(load_config(config, overrides))


def select(
    method: Annotated[str, typer.Argument(help=f"{', '.join(SELECTIONS)}. docs/selection.md says which one when.")],
    pool: Annotated[str, typer.Option(help="Token shards to select from; as data.train.")] = "",
    target: Annotated[
        list[str] | None,
        typer.Option(
            help="Token shards that the selection is for; as data.target. May be repeated: several sets count the same."
        ),
    ] = None,
    budget: Annotated[str, typer.Option(help="Tokens to select, as 30_000_000; as selection.budget.")] = "",
    output: Annotated[
        str, typer.Option(help="New folder of the selected shards; as selection.output. Default: in the storage.")
    ] = "",
    scores: Annotated[
        bool, typer.Option("--scores", help="Also keep the scores of the whole pool: selection.scores= takes them.")
    ] = False,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Select a part of a pool of token shards, as token shards that `train` takes; the same command resumes."""
    from ray_dwm.orchestration.select import select as run

    if method not in SELECTIONS:
        raise UserError(f"there is no method {method!r}: it must be one of {', '.join(SELECTIONS)}")
    given = {"data.selection": method, "data.train": pool, "selection.budget": budget, "selection.output": output}
    given["weighting.method"] = "uniform"  # a selection is not refused for what a DWM would need
    for place, folder in enumerate(target or [], start=1):
        given["data.target" if place == 1 else f"data.more_targets.target-{place}"] = folder
    given["selection.keep_scores"] = "true" if scores else ""
    options = [f"{key}={value}" for key, value in given.items() if value]
    run(load_config(config, [*options, *(overrides or [])]))


def score(
    dwm: Annotated[Path, typer.Option(help="A DWM folder; as selection.dwm.folder.")],
    pool: Annotated[Path, typer.Option(help="Token shards to score; as data.train.")],
    output: Annotated[Path, typer.Option(help="Parquet file of the scores; `select dwm selection.scores=` takes it.")],
    rounds: Annotated[int, typer.Option(min=0, help="Random batches for each sequence; 0: selection.dwm.rounds.")] = 0,
    batch: Annotated[int, typer.Option(min=0, help="Sequences of a batch; 0: selection.dwm.batch.")] = 0,
    config: Config = None,
    overrides: Overrides = None,
) -> None:
    """Score sequences that a DWM was not learnt on: the mean over random batches, and the spread."""
    from ray_dwm.orchestration.score import score as run

    given: dict[str, object] = {"selection.dwm.folder": dwm, "data.train": pool, "weighting.method": "uniform"}
    given |= {f"selection.dwm.{key}": value for key, value in (("rounds", rounds), ("batch", batch)) if value}
    options = [f"{key}={value}" for key, value in given.items()]
    run(load_config(config, [*options, *(overrides or [])]), output)
