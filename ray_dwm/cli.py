"""The console: parse, load the configuration, make one call. Exit codes: 0 done, 1 the run failed, 2 wrong input."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from ray_dwm.config import RunConfig, load
from ray_dwm.errors import DwmError, UserError
from ray_dwm.planning.options import number, whole
from ray_dwm.selecting import MethodName

app = typer.Typer(
    help="Pre-train LMs with a learned Data Weighting Model on Ray.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

SELECTIONS = get_args(MethodName)[1:]  # but for `none`

Config = Annotated[
    list[Path] | None,
    typer.Option("--config", help="YAML file with what differs from the defaults; a further one goes over it."),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Dotted overrides: train.steps=200 dwm.size=s", metavar="KEY=VALUE")
]


def _number(help: str, parser: Callable[[str], float]) -> Any:
    return typer.Option(help=help, parser=parser, metavar="NUMBER")


# Parsed by us, not by the console's own types: one line that names the remedy, in place of a box with the usage.
Gpus = Annotated[
    int | None, _number("GPUs, one for each worker.", whole("--gpus", "as many as cluster.workers", 1, 2**20))
]
Mfu = Annotated[float | None, _number("MFU to assume.", number("--mfu", "a published one", most=1))]
Price = Annotated[float | None, _number("Of a GPU-hour.", number("--price", "no cost"))]
Vocab = Annotated[
    int | None,
    _number("Vocabulary, where there are no shards yet.", whole("--vocab", "that of the presets", 2, 2**31 - 1)),
]
Network = Annotated[
    float | None,
    _number("Gb/s between nodes for each GPU.", number("--network-gbps", "that of the vendor's own systems")),
]
HostMemory = Annotated[
    float | None,
    _number("GB of a node's host memory.", number("--host-memory-gb", "that of the vendor's own systems")),
]


def _check_output(output: Path | None, option: str = "--output") -> None:
    """An output file is refused before the work, not after it."""
    if output is None:
        return
    folder = output.absolute().parent
    if output.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"{option} {output} cannot be written: name a file in a folder that exists")


def _load(config: list[Path] | None, overrides: list[str] | None) -> RunConfig:
    return load(config or [], overrides or [])


@app.command()
def prepare(config: Config = None, overrides: Overrides = None) -> None:
    """Turn text into packed token shards (the prepare section says which)."""
    from ray_dwm.orchestration.prepare import prepare_sets

    prepare_sets(_load(config, overrides))


@app.command()
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
    run(_load(config, [*options, *(overrides or [])]))


@app.command()
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
    run(_load(config, [*options, *(overrides or [])]), output)


@app.command()
def train(config: Config = None, overrides: Overrides = None) -> None:
    """Train an LM, with the weights that weighting.method names; the same command resumes."""
    from ray_dwm.orchestration.train import train as run

    run_config = _load(config, overrides)
    summary = run(run_config)
    for name, value in summary["final"].items():
        typer.echo(f"{name} {value:.4f}")
    typer.echo(f"[{run_config.name}] done: {run_config.run_dir}")


@app.command()
def doctor(
    config: Config = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the rows as JSON.")] = False,
) -> None:
    """Check whatever would make a run fail, before it starts; exit code 2 where something would."""
    from rich.console import Console

    from ray_dwm.orchestration.doctor import Doctor
    from ray_dwm.orchestration.findings import has_failed, show, to_json

    given = _load(config, overrides) if config or overrides else None
    # Ray prints what its nodes have to say; standard output is for the rows alone.
    with redirect_stdout(sys.stderr), Console(stderr=True).status("doctor") as status:
        findings = Doctor(given, lambda name: status.update(f"checking {name}")).examine()
    if as_json:
        typer.echo(to_json(findings))
    else:
        # A job's log is no terminal, and would get 80 columns.
        wide = None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160
        show(findings, Console(width=wide))
    raise typer.Exit(2 if has_failed(findings) else 0)


@app.command()
def evaluate(
    lm: Annotated[Path, typer.Argument(help="A run folder or a Hugging Face folder.")],
    shards: Annotated[list[Path], typer.Argument(help="Folders of token shards.")],
    batch: Annotated[int, typer.Option(min=1, help="Sequences in one forward pass.")] = 32,
    output: Annotated[Path | None, typer.Option(help="Also write the figures as JSON.")] = None,
) -> None:
    """Loss, perplexity and bits-per-byte of an LM, per domain."""
    from ray_dwm.evaluation.perplexity import evaluate_folders, format_table, write_json

    _check_output(output)
    results = evaluate_folders(lm, shards, batch)
    typer.echo(format_table(results))
    if output is not None:
        write_json(results, output)


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    output: Annotated[Path, typer.Argument(help="New folder: lm/ in Hugging Face layout, dwm/ with the newest DWM.")],
) -> None:
    """Copy a finished run's LM and DWM to a folder of their own."""
    from ray_dwm.evaluation.export import export_run

    export_run(run, output)
    typer.echo(f"exported to {output}")


@app.command()
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

    _check_output(output)
    _check_output(numbers, "--json")
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


@app.command()
def plan(
    config: Config = None,
    overrides: Overrides = None,
    gpus: Gpus = None,
    gpu: Annotated[str, typer.Option(help="Kind of GPU, as h100 or a100-40g.")] = "h100",
    mfu: Mfu = None,
    price: Price = None,
    vocab: Vocab = None,
    network_gbps: Network = None,
    host_memory_gb: HostMemory = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in bytes and seconds.")] = False,
) -> None:
    """Say what a run will need before it is started: memory, time, communication, cost, and the cheapest layout."""
    from ray_dwm.planning import plan as planning
    from ray_dwm.planning import table

    run_config, refused = planning.on_gpus(config or [], overrides or [], gpus or 0)
    found = planning.plan(
        run_config,
        gpu,
        mfu=mfu or 0.0,
        price=price or 0.0,
        vocab=vocab or 0,
        network_gbps=network_gbps or 0.0,
        host_memory_gb=host_memory_gb or 0.0,
        refused=refused,
    )
    if as_json:
        typer.echo(json.dumps(table.as_json(found), indent=2))
    else:
        table.show(found)


@app.command()
def compare(config: Config = None, overrides: Overrides = None) -> None:
    """Train with uniform weights and as configured, with equal data, seed and tokens; evaluate, report, verdict."""
    from ray_dwm.orchestration.compare import compare as run

    typer.echo(run(_load(config, overrides)))


@app.command()
def experiment(
    file: Annotated[Path, typer.Argument(help="What is compared: methods, seeds, sizes (docs/experiments.md).")],
    overrides: Overrides = None,
    methods: Annotated[str, typer.Option(help="Only these, as random,dsir, and what they need.")] = "",
    seeds: Annotated[str, typer.Option(help="Only these, as 0,1.")] = "",
    parallel: Annotated[int, typer.Option(min=1, help="Cells at once, where the cluster has room.")] = 1,
    only_table: Annotated[
        bool, typer.Option("--only-table", help="Run nothing: the leaderboard of what is done.")
    ] = False,
    cell: Annotated[str, typer.Option(hidden=True)] = "",
) -> None:
    """Train every cell of a declared grid and write a leaderboard; the same command continues."""
    from ray_dwm.analysis.publish import LEADERBOARD
    from ray_dwm.experimenting import load_experiment
    from ray_dwm.orchestration import experiment as job

    config = load_experiment(file, overrides or [])
    if cell:
        raise typer.Exit(0 if job.one_cell(config, cell) else 1)
    if only_table:
        board = job.table(config)
    else:
        seed = whole("--seeds", "all of them", 0, 2**63 - 1)
        chosen = job.choose(config, _words(methods), [seed(word) for word in _words(seeds)])
        board = job.experiment(config, chosen, parallel=parallel)
    for line in (*board.verdict, *board.notes):
        typer.echo(f"- {line}")
    typer.echo(f"leaderboard: {config.folder / LEADERBOARD}.md, .json, .html")


def _words(text: str) -> list[str]:
    return [word for part in text.split(",") if (word := part.strip())]


def main() -> None:
    """Console entry point: one clear line instead of a traceback where this package raised the error."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        app()
    except DwmError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # as of `| head`: nobody is left to be told
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


if __name__ == "__main__":
    main()
