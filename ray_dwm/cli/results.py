"""The commands that look at what was trained: evaluate, export, analyze."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ray_dwm.cli.options import check_output


def evaluate(
    lm: Annotated[Path, typer.Argument(help="A run folder or a Hugging Face folder.")],
    shards: Annotated[list[Path], typer.Argument(help="Folders of token shards.")],
    batch: Annotated[int, typer.Option(min=1, help="Sequences in one forward pass.")] = 32,
    output: Annotated[Path | None, typer.Option(help="Also write the figures as JSON.")] = None,
) -> None:
    """Loss, perplexity and bits-per-byte of an LM, per domain."""
    from ray_dwm.evaluation.perplexity import evaluate_folders, format_table, write_json

    check_output(output)
    results = evaluate_folders(lm, shards, batch)
    typer.echo(format_table(results))
    if output is not None:
        write_json(results, output)


def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    output: Annotated[Path, typer.Argument(help="New folder: lm/ in Hugging Face layout, dwm/ with the newest DWM.")],
) -> None:
    """Copy a finished run's LM and DWM to a folder of their own."""
    from ray_dwm.evaluation.export import export_run

    export_run(run, output)
    typer.echo(f"exported to {output}")


def analyze(
    runs: Annotated[
        list[str],
        typer.Argument(
            help="Run folders; the first with uniform weights is the baseline. selection.KEY=VALUE places the work.",
            metavar="RUN",
        ),
    ],
    output: Annotated[Path, typer.Option(help="The report.")] = Path("report.html"),
    preferences: Annotated[
        bool, typer.Option(help="Measure what the weights relate to, and when; docs/analysis.md.")
    ] = True,
    reference: Annotated[
        str,
        typer.Option(
            help="Run folder or Hugging Face folder of the LM whose perplexity is looked at, or none. Default: the run "
            "with uniform weights on the same data."
        ),
    ] = "",
    samples: Annotated[int, typer.Option(min=1, help="Sequences of each run that are looked at, at most.")] = 6144,
    seed: Annotated[int, typer.Option(min=0, help="Of all samples and resamples.")] = 0,
    numbers: Annotated[Path | None, typer.Option("--json", help="Also write what was measured as JSON.")] = None,
) -> None:
    """Write report.html: losses, what was preferred and when, favoured texts, overhead."""
    from ray_dwm.orchestration import analyze as analysis

    check_output(output)
    check_output(numbers, "--json")
    folders, overrides = analysis.apart(runs)
    asked = analysis.Analysis(
        output=output,
        samples=samples,
        seed=seed,
        reference=reference,
        preferences=preferences,
        numbers=numbers,
        overrides=overrides,
    )
    analysis.analyze(folders, asked)
    typer.echo(f"report: {output}")
