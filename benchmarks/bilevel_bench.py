"""What the tables of benchmarks/bilevel.py share: settings of the bi-level step, and an LM on which they take turns."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from common import make_shards, now, run_config, spread
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ray_dwm.config import BilevelConfig, RunConfig
from ray_dwm.engine.batch import Batch, to_batch
from ray_dwm.engine.checks import check_data
from ray_dwm.engine.given import build_learner
from ray_dwm.engine.learner import Feedback, LocalWeightService
from ray_dwm.engine.setup import build, build_weigher
from ray_dwm.engine.upper import UpperLevel
from ray_dwm.engine.weigher import Weigher
from ray_dwm.engine.weighting import Statistics
from ray_dwm.models.presets import PRESETS

NEVER = 10**9


SETTINGS: dict[str, list[str]] = {
    "default": [],
    "fast": [f"bilevel.rank={BilevelConfig().rank // 2}"],
    "central": ["bilevel.estimator=central"],
    "one_sided": ["bilevel.estimator=one_sided"],
    "ghost": ["bilevel.estimator=ghost", "bilevel.target_at=theta"],
    "central 1/4": ["bilevel.estimator=central", "bilevel.fraction=0.25"],
    "one_sided 1/2": ["bilevel.estimator=one_sided", "bilevel.fraction=0.5"],
    "reuse 4": ["bilevel.reuse=4"],
    "jvp": ["bilevel.estimator=jvp"],
    "exact": ["bilevel.estimator=exact"],
}
"""Name -> overrides; `fast` halves the default's rank and target batch."""
ORACLES = ("jvp", "exact")
"""Settings that nobody trains with, and no LM above the quickstart's size can."""


def settings(args: argparse.Namespace) -> dict[str, list[str]]:
    """The settings that are asked for, with their target batches, without the oracles; the default always."""
    chosen = [name for name in SETTINGS if name not in ORACLES and name in ("default", *args.settings)]
    return {name: _complete(args, name) for name in chosen}


def oracles(args: argparse.Namespace) -> dict[str, list[str]]:
    """The oracles that are asked for, where the LM is small enough."""
    return {name: _complete(args, name) for name in ORACLES if name in args.settings and small(args.preset)}


def _complete(args: argparse.Namespace, name: str) -> list[str]:
    size = args.target_batch // 2 if name == "fast" else args.target_batch
    return [f"bilevel.target_batch={size}", *SETTINGS[name]]


def small(preset: str) -> bool:
    """Whether an LM is no larger than the quickstart's."""
    return list(PRESETS).index(preset) <= list(PRESETS).index("quickstart")


def fresh_share(bilevel: BilevelConfig, every: int) -> float:
    """Part of the bi-level steps that make the target gradient anew: every `reuse`-th, or when it is too old."""
    made, fresh, updates = -NEVER, 0, 50 * bilevel.reuse
    for update in range(updates):
        if update % bilevel.reuse == 0 or update * every - made > bilevel.max_staleness:
            made, fresh = update * every, fresh + 1
    return fresh / updates


def random_shards(args: argparse.Namespace, folder: Path) -> None:
    """Shards `train` and `target` for tables in which the tokens' values do not matter."""
    make_shards(folder / "train", 4 * args.global_batch, args.vocab, args.seq_len)
    make_shards(folder / "target", max(64, args.target_batch), args.vocab, args.seq_len)


def dwm_config(args: argparse.Namespace, folder: Path, *overrides: str) -> RunConfig:
    """A run with a DWM on these shards; a bi-level step at every step from the second on, no checks of fidelity."""
    return run_config(
        args,
        folder,
        f"data.target={folder / 'target'}",
        "train.schedule=constant",
        "train.eval_sequences=8",
        "bilevel.every=1",
        "bilevel.warmup_steps=1",
        "bilevel.fidelity_every=0",
        *overrides,
    )


class TimedService(LocalWeightService):
    """Notes how long the DWM's last update took: in a Ray run an actor does it beside training."""

    seconds = 0.0

    def submit(self, feedback: Feedback) -> None:
        """See WeightService."""
        start = now()
        super().submit(feedback)
        self.seconds = now() - start


class _TimedWeighing:
    """A weigher that notes how long it took, on a GPU too."""

    seconds = 0.0

    def __init__(self, weigher: Weigher) -> None:
        self._weigher = weigher
        self.statistics: Statistics = weigher.statistics

    def weigh(self, batch: Batch, statistics_bS: Tensor | None) -> tuple[Tensor, Tensor]:
        """See Weighting."""
        start = now()
        found = self._weigher.weigh(batch, statistics_bS)
        self.seconds = now() - start
        return found


@dataclass(slots=True)
class _Seat:
    """A setting's own DWM and count of bi-level steps."""

    upper: UpperLevel
    weigher: Weigher
    weighing: Any
    service: TimedService
    step: int = 1


class Bench:
    """One LM on which plain steps and bi-level steps of several settings take turns, as engine/loop.py takes them.

    Every setting has a DWM of its own; they all train the one LM.
    """

    def __init__(self, config: RunConfig) -> None:
        self._parts = build(config)
        self.lower = self._parts.lower
        self._rows = self._parts.source.stream(0, NEVER)
        self._seats: dict[str, _Seat] = {}
        self._step = 0

    def seat(self, name: str, config: RunConfig) -> None:
        """Let a setting take part; its configuration has bilevel.every=1."""
        train = check_data(config)
        service = TimedService(build_learner(config, train))
        weigher = build_weigher(config, train, service, self._parts.device)
        upper = UpperLevel(config, self.lower, weigher, self._parts.targets, self._parts.seq_len, self._parts.device)
        self._seats[name] = _Seat(upper, weigher, _TimedWeighing(weigher), service)

    def _next(self) -> Batch:
        self._step += 1
        return to_batch(
            next(self._rows), self._parts.config.train.global_batch, self._parts.seq_len, self._parts.device
        )

    def plain(self) -> float:
        """Seconds of a step of plain training."""
        batch, start = self._next(), now()
        self.lower.step(self._step, batch, None)
        self.lower.zero_grad()
        return now() - start

    def turn(self, name: str) -> dict[str, float]:
        """Seconds of a step with a DWM and a bi-level step, by part; `step` is what is left of the LM's own step."""
        seat, batch, marks = self._seats[name], self._next(), [now()]
        seat.weigher.advance(seat.step)
        marks.append(now())
        seat.upper.begin(seat.step, batch)
        marks.append(now())
        result = self.lower.step(self._step, batch, seat.weighing)
        marks.append(now())
        seat.upper.finish(seat.step, batch, result)
        marks.append(now())
        self.lower.zero_grad()
        figures = seat.upper.figures(seat.step, {})
        seat.step += 1
        waited, begun, stepped, finished = (b - a for a, b in pairwise(marks))
        parts = {k.removeprefix("bilevel_seconds/"): v for k, v in figures.items() if k.startswith("bilevel_seconds/")}
        inside = sum(v for k, v in parts.items() if k != "watch")
        return {
            **parts,
            "dwm_wait": waited,
            "weigh": seat.weighing.seconds,
            "dwm_update": seat.service.seconds,
            "other": begun + finished - inside - seat.service.seconds,
            "step": stepped - seat.weighing.seconds - parts["watch"],
        }

    def pair(self, name: str) -> dict[str, float]:
        """A plain step and a bi-level step right after it."""
        plain = self.plain()
        return {"plain": plain, **self.turn(name)}


BILEVEL_PARTS = ("target_gradient", "direction", "contraction", "watch", "other")
"""Of what a bi-level step adds; `other`: batches drawn, LM copied, results gathered. What no clock sees is `elsewhere`:
what the LM's own step took longer than the plain step just before it. It is stated apart, since it is a difference of
two long times, and no part of what is computed from the parts."""
STEP_PARTS = ("dwm_wait", "weigh")
"""Of what every step adds."""


def column(pairs: Sequence[dict[str, float]], part: str) -> dict[str, float]:
    """Median and range of one part over pairs, in seconds; a target gradient counts where one was made."""
    if part == "elsewhere":
        return spread([pair["step"] - pair["plain"] for pair in pairs])
    values = [pair[part] for pair in pairs]
    made = [value for value in values if value > 0]
    return spread(made if part == "target_gradient" and made else values)


def show(title: str, heads: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for index, head in enumerate(heads):
        table.add_column(head, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*[f"{x:.4g}" if isinstance(x, float) else "-" if x is None else str(x) for x in row])
    Console(width=180, soft_wrap=True).print(table)


def percent(value: float | None) -> str | None:
    """A share as text."""
    return None if value is None else f"{value:.2%}"
