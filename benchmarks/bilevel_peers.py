"""Table `peers`: the hypergradient through our engine against libraries that differentiate through the optimizer.

What counts is a contender's EXTRA time: its step less a plain step of its kind (`plain`, a bare loop, for the peers;
`engine` for ours). Every contender has a process of its own, of one thread on the CPU, and they take turns: threads
that wait for one another would be timed. A peer that is not installed is reported so.
"""

from __future__ import annotations

import argparse
import multiprocessing
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from bilevel_bench import show, small
from common import now, peak_of, resident, spread
from differentiable_peers import CONTENDERS, PEERS, Contender, Problem, installed

from ray_dwm.engine.bilevel import centred_cosine

MIN_COSINE = 0.999
BAR = 3.0
OURS = ("ours", "central")
CASES = {"target batch = batch": None, "our target batch": "target_batch"}
"""Name -> the option that holds the target batch."""


def measure_all(contenders: Sequence[str], problems: Sequence[Problem], rounds: int) -> list[dict[str, Any]]:
    """Costs and results of contenders that take turns, for one problem after the other.

    Returns:
        Per problem and contender `installed`, and where it is: `seconds` of a step with its hypergradient (one per
        round; none of `exact`), `extra_bytes` at its peak above what was resident before, `values` (B floats).
    """
    context = multiprocessing.get_context("spawn")  # a fork would inherit this process's memory
    workers = {}
    results: list[dict[str, Any]] = []
    try:
        for name in filter(installed, contenders):
            mine, theirs = context.Pipe()
            process = context.Process(target=_work, args=(name, problems, theirs), daemon=True)
            process.start()
            theirs.close()  # so that a worker's death is an EOFError here
            workers[name] = (process, mine)
        for _ in problems:
            found: dict[str, Any] = {name: {"installed": installed(name)} for name in contenders}
            for name, (_, pipe) in workers.items():
                pipe.send("begin")
                found[name] |= pipe.recv() | {"seconds": []}
            for _ in range(rounds):
                for name in (name for name in workers if name != "exact"):
                    workers[name][1].send("go")
                    found[name]["seconds"].append(workers[name][1].recv())
            for _, pipe in workers.values():
                pipe.send("next")
            results.append(found)
    finally:
        for process, pipe in workers.values():
            pipe.close()
            process.join()
    return results


def _work(name: str, problems: Sequence[Problem], pipe: Connection) -> None:
    """A contender's process: its first turn of a problem gives memory and values, later ones seconds on request."""
    if not torch.cuda.is_available():
        torch.set_num_threads(1)
    tiny = replace(problems[0], preset="tiny", vocab=64, seq_len=8, batch=2, target_batch=2)
    CONTENDERS[name](tiny).turn()  # loads the libraries' code, so that it does not count
    with suppress(EOFError):  # the benchmark is over early
        for problem in problems:
            pipe.recv()
            contender = CONTENDERS[name](problem)
            put_back = contender.keep()
            pipe.send(_first(contender))
            while pipe.recv() == "go":
                put_back()
                begin = now()
                contender.turn()
                pipe.send(now() - begin)


def _first(contender: Contender) -> dict[str, Any]:
    values = []
    before = resident()
    peak = peak_of(lambda: values.append(contender.turn()))
    return {"extra_bytes": peak - before, "values": values[0].tolist()}


def summarise(results: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Figures of each contender; differences and ratios of times are taken within a round."""
    rows: dict[str, dict[str, Any]] = {}
    exact = torch.tensor(results["exact"]["values"])
    for name, found in results.items():
        if name == "exact":
            continue
        rows[name] = row = {"installed": found["installed"]}
        if not found["installed"]:
            continue
        row |= {"seconds": spread(found["seconds"]), "extra_peak_mib": found["extra_bytes"] / 2**20}
        if name in ("plain", "engine"):
            continue
        extra = _extra(results, name)
        row |= {"extra_seconds": spread(extra), "extra_over_plain_step": spread(_over(extra, _below(results, name)))}
        row["cosine_to_exact"] = centred_cosine(torch.tensor(found["values"]), exact)
        if name in PEERS:
            for ours in OURS:
                row[f"extra_over_{ours}"] = spread(_over(extra, _extra(results, ours)))
                row[f"total_over_{ours}"] = spread(_over(found["seconds"], results[ours]["seconds"]))
                row[f"extra_peak_over_{ours}"] = found["extra_bytes"] / results[ours]["extra_bytes"]
    return rows


def _below(results: dict[str, dict[str, Any]], name: str) -> list[float]:
    return results["engine" if name in OURS else "plain"]["seconds"]


def _extra(results: dict[str, dict[str, Any]], name: str) -> list[float]:
    return [a - b for a, b in zip(results[name]["seconds"], _below(results, name), strict=True)]


def _over(left: list[float], right: list[float]) -> list[float]:
    return [a / b for a, b in zip(left, right, strict=True)]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The table, with the quickstart's LM where the options name a larger one."""
    preset = args.preset if small(args.preset) else "quickstart"
    targets = [getattr(args, option) if option else args.peer_batch for option in CASES.values()]
    shape = {"preset": preset, "seq_len": min(args.seq_len, 128), "batch": args.peer_batch}
    problems = [Problem(vocab=args.vocab, target_batch=target, **shape) for target in targets]
    found = measure_all(list(CONTENDERS), problems, max(1, args.rounds // 2))
    rows = (
        {"target_batch": target, "rows": summarise(of_case)} for target, of_case in zip(targets, found, strict=True)
    )
    return {"bar": BAR, **shape, "cases": dict(zip(CASES, rows, strict=True))}


def report(result: dict[str, Any]) -> None:
    """Print the table."""
    for case, found in result["cases"].items():
        rows = []
        for name, row in found["rows"].items():
            if not row["installed"]:
                rows.append([name, f"not installed: pip install {name}=={PEERS[name]}", *[""] * 7])
                continue
            extra, over, bar = (row.get(k) for k in ("extra_seconds", "extra_over_plain_step", "extra_over_ours"))
            rows.append(
                [
                    name,
                    f"{row['seconds']['median']:.3f}",
                    f"{extra['median']:.3f}" if extra else "",
                    f"{over['median']:.2f}" if over else "",
                    f"{row['extra_peak_mib']:.0f}",
                    f"{bar['median']:.2f}" if bar else "",
                    f"{row['total_over_ours']['median']:.2f}" if bar else "",
                    ("yes" if bar["median"] >= BAR else "NO") if bar else "",
                    f"{row['cosine_to_exact']:.6f}" if extra else "",
                ]
            )
        heads = ["contender", "step s", "extra s", "extra / step", "extra peak MiB", "extra / ours", "total / ours"]
        title = f"peers, {result['preset']}, batch {result['batch']} x {result['seq_len']}, {case}"
        show(f"{title}: {found['target_batch']}", [*heads, f">= {BAR:g}", "cosine"], rows)


def disagreements(result: dict[str, Any]) -> list[str]:
    """Peers whose hypergradient is not ours."""
    return [
        f"{name} disagrees with the exact alignments ({case}): cosine {row['cosine_to_exact']:.6f} < {MIN_COSINE}"
        for case, found in result.get("cases", {}).items()
        for name, row in found["rows"].items()
        if row.get("cosine_to_exact", 1.0) < (MIN_COSINE if name in PEERS else 0.0)
    ]
