"""What the environment of a worker without a GPU (huge pages, memory kept) does to its speed.

    python benchmarks/allocator.py

The same steps in a thread of a fresh process each, as Ray Train runs them, in turn: without the variables, with huge
pages alone, with all of them. Figures are the ratios of tokens per second to none. On a CPU alone.
"""

from __future__ import annotations

import os
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from common import WARM_STEPS, make_shards, parser, run_config, run_ranks, spread, timed_fit, write_result

from ray_dwm.config import RunConfig
from ray_dwm.orchestration.cluster import worker_environment

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"


def in_thread(config: RunConfig, steps: int, name: str) -> float:
    """Seconds of the steps; a thread takes its memory from another arena of glibc than the process' first one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(timed_fit, config, steps, name).result()


def measure(config: RunConfig, steps: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of every turn of each environment."""
    everything = worker_environment(config)
    ways = {"none": {}, "huge_pages": {HUGE_PAGES: everything[HUGE_PAGES]}, "all": everything}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds):
        for name, environment in ways.items():
            for variable in everything:
                os.environ.pop(variable, None)
            os.environ.update(environment)
            seconds[name].append(run_ranks(in_thread, 1, config, steps, f"{name}-{turn}", fresh=True))
    return seconds


def main() -> None:
    """Command line."""
    args = parser(__doc__, workers=1, steps=8, rounds=3).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_shards(Path(folder) / "train", (args.steps + WARM_STEPS + 1) * args.global_batch, args.vocab, args.seq_len)
        config = run_config(args, Path(folder), "weighting.method=uniform")
        seconds = measure(config, args.steps, args.rounds)
    result = {
        "seconds": seconds,
        **{
            name: spread([a / b for a, b in zip(seconds["none"], seconds[name], strict=True)])
            for name in ("huge_pages", "all")
        },
    }
    print(f"tokens/s over none: huge pages {result['huge_pages']}, all {result['all']}")
    print(f"written to {write_result('allocator', args, config, result)}")


if __name__ == "__main__":
    main()
