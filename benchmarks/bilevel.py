"""What the hypergradient costs and how good it is: the one command behind every figure about the bi-level step.

    python benchmarks/bilevel.py                     # all tables and the figure
    python benchmarks/bilevel.py --tables growth     # one anew; the result file keeps the others

| table | question |
|---|---|
| cost | what does training with a DWM cost over training without, by setting, N and part? |
| memory | what is a rank's peak in a bi-level step over a plain step? |
| fidelity | how near are alignments and phi-gradient to the exact ones? `sampling` in it is noise, not error |
| growth | how does the cost grow with batch, sequence length, LM and DWM? |
| peers | what do libraries that differentiate through the optimizer's step need for the same? |

Two gloo ranks of one thread each on the CPU; one process with CUDA. Needs no Ray, except to prepare the quickstart's
text for `fidelity` where that has not been done.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import bilevel_cost
import bilevel_fidelity
import bilevel_figure
import bilevel_growth
import bilevel_memory
import bilevel_peers
import torch
from bilevel_bench import SETTINGS, dwm_config
from bilevel_probe import GROUP
from common import parser, result_path, versions, where, write_result

from ray_dwm.config import BilevelConfig
from ray_dwm.models.presets import PRESETS

TABLES: dict[str, ModuleType] = {
    "cost": bilevel_cost,
    "memory": bilevel_memory,
    "fidelity": bilevel_fidelity,
    "growth": bilevel_growth,
    "peers": bilevel_peers,
}


def parse_args() -> argparse.Namespace:
    """Command line."""
    p = parser(__doc__.split("\n")[0], steps=10, rounds=5)
    p.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES), metavar="TABLE")
    p.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS), metavar="SETTING")
    p.add_argument("--target-batch", type=int, default=BilevelConfig().target_batch)
    p.add_argument("--runs", type=int, default=4, help="cost: whole runs of `steps` steps at N=10, interleaved")
    p.add_argument("--wider", default=None, help="cost, memory, growth: a second LM; none: 30m on the CPU")
    p.add_argument("--wider-seq-len", type=int, default=32)
    p.add_argument("--wider-runs", type=int, default=0, help="as --runs, for the wider LM")
    p.add_argument("--corpus", choices=("auto", "synthetic"), default="auto", help="fidelity: auto is real text")
    p.add_argument("--points", type=int, nargs="+", default=[20, 60, 120], help="fidelity: LM steps before a look")
    p.add_argument("--target-pool", type=int, default=256, help="fidelity: target sequences that stand for all")
    p.add_argument("--peer-batch", type=int, default=32, help="peers: training batch, a rank's share of the usual one")
    args = p.parse_args()
    if args.wider is None:
        args.wider = "30m" if args.preset == "quickstart" and not torch.cuda.is_available() else ""
    for preset in filter(None, (args.preset, args.wider)):
        if preset not in PRESETS:
            p.error(f"no preset {preset!r}: use {', '.join(PRESETS)}")
    if torch.cuda.is_available():
        args.workers = 1
    if "fidelity" in args.tables and (args.target_batch % (2 * GROUP) or GROUP % args.workers):
        p.error(f"fidelity: --target-batch must be a multiple of {2 * GROUP}, --workers a divisor of {GROUP}")
    return args


def made_with(args: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """What a table must state of itself, since the tables of a file may have been made apart."""
    options = {key: value for key, value in vars(args).items() if key not in ("output", "tables")}
    return {"seconds": round(seconds, 1), "device": where(), "versions": versions(), "options": options}


def main() -> None:
    """Measure the tables that are asked for, print them, and write the file and the figure."""
    args = parse_args()
    path = result_path("bilevel", args)
    tables: dict[str, Any] = json.loads(path.read_text())["result"] if path.exists() else {}
    for name in args.tables:
        start = time.perf_counter()
        found = TABLES[name].run(args)
        tables[name] = {"made_with": made_with(args, time.perf_counter() - start), "figures": found}
        TABLES[name].report(found)
        print(f"({name}: {tables[name]['made_with']['seconds']:.0f} s)\n", flush=True)
        write_result("bilevel", args, dwm_config(args, Path(tempfile.gettempdir())), tables)
    print(f"written to {path} and {bilevel_figure.draw(tables, args)}")
    for failure in bilevel_peers.disagreements(tables.get("peers", {}).get("figures", {})):
        raise SystemExit(failure)


if __name__ == "__main__":
    main()
