"""The looks of table `fidelity` at points of a training run: rank code. benchmarks/bilevel_fidelity.py explains it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from bilevel_reference import PhiKernel, Reference, direction, problem, take, target_gradient
from torch import Tensor

from ray_dwm.config import BilevelConfig, RunConfig
from ray_dwm.data.plan import target_rows
from ray_dwm.engine.batch import Batch, take_share, to_batch
from ray_dwm.engine.bilevel import BilevelStep, centred_cosine
from ray_dwm.engine.contraction import FiniteDifference
from ray_dwm.engine.mesh import all_gather_rows, all_sum
from ray_dwm.engine.parts import Parts
from ray_dwm.engine.setup import build
from ray_dwm.engine.step import LowerLevel
from ray_dwm.engine.upper import UpperLevel
from ray_dwm.engine.weigher import Weigher
from ray_dwm.models.dwm import build_dwm

RANKS = (4, 8, 16, 32, 64)
EPSILONS = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SIZES = (4, 8, 16, 32)
STRIDES = (1, 2, 4, 8)
"""Every how many-th sequence is contracted."""
GROUP = 4
"""Target sequences whose gradient is contracted at a time; every target batch is a union of groups."""
DRAWS = 8
AGE = 10
"""LM steps that a stale target gradient is old."""

Rows = dict[str, list[list[float]]]
"""Row -> [cosine of the alignments, of the phi-gradient]; more than one of them where there are draws."""
Tables = dict[str, Rows]
"""Table, with its precision -> rows."""


@dataclass(frozen=True, slots=True)
class Moment:
    """An LM step that can be taken again."""

    step: int
    batch: Batch
    state: list[Tensor]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is looked at."""

    points: Sequence[int]
    settings: dict[str, BilevelConfig]
    pool: int
    """Target sequences that stand for all."""
    exact: bool
    """Whether the reference is exact; else by Richardson's rule."""


def walk(config: RunConfig, plan: Plan) -> list[Tables]:
    """Train as configured, with the DWM, and look at every point on the way."""
    parts = build(config)
    lower, weigher = parts.lower, parts.weigher
    assert weigher is not None
    coarse = build(replace(config, train=replace(config.train, precision="bf16"))).lower
    upper = UpperLevel(config, lower, weigher, parts.targets, parts.seq_len, parts.device)
    rows = parts.source.stream(0, max(plan.points) + 1)
    found: list[Tables] = []
    olds: dict[int, Moment] = {}
    for step in range(max(plan.points) + 1):
        batch = to_batch(next(rows), config.train.global_batch, parts.seq_len, parts.device)
        if step == 0:
            coarse.step(0, batch, None)  # its optimizer makes the state that a look will overwrite
            coarse.zero_grad()
        weigher.advance(step)
        if any(step == max(1, point - AGE) for point in plan.points):
            olds[step] = Moment(step, batch, lower.everything())
        if step in plan.points:
            now = Moment(step, batch, lower.everything())
            found.append(Look(parts, coarse, plan, olds[max(1, step - AGE)], now).tables())
            lower.restore(now.state)
        _train(lower, upper, weigher, step, batch)
    return found


def _train(lower: LowerLevel, upper: UpperLevel, weigher: Weigher, step: int, batch: Batch) -> None:
    due = upper.due(step)
    if due:
        upper.begin(step, batch)
    result = lower.step(step, batch, weigher)
    if due:
        upper.finish(step, batch, result)
    lower.zero_grad()


class Look:
    """All comparisons at one point."""

    def __init__(self, parts: Parts, coarse: LowerLevel, plan: Plan, old: Moment, now: Moment) -> None:
        assert parts.weigher is not None
        self._parts, self._plan, self._old, self._now = parts, plan, old, now
        self._weigher = parts.weigher
        self._lowers = {"fp32": parts.lower, "bf16": coarse}
        reader = parts.targets["target"]
        pool = min(plan.pool, reader.manifest.rows) // GROUP * GROUP
        self._pool = target_rows(reader.manifest.rows, pool, now.step, parts.config.seed)
        self._taken = take(parts.lower, now.step, now.batch, self._weigher)
        self._reference = Reference(parts.lower, self._taken, plan.exact)
        columns, counts = [], []
        for start in range(0, pool, GROUP):
            group = self._targets(start, start + GROUP)
            columns.append(self._reference.alignments(target_gradient(parts.lower, group)))
            counts.append(float(all_sum(group.mask.sum())))
        self._columns_BG, self._counts_G = torch.stack(columns, 1).double(), torch.tensor(counts).double()
        dwm = build_dwm(self._weigher.shape, seed=0).to(parts.device)
        dwm.load_state_dict(self._weigher.parameters())
        c = parts.config.dwm
        self._phi = PhiKernel(dwm, all_gather_rows(now.batch.input_ids), c.temperature, c.floor)

    def _targets(self, start: int, stop: int) -> Batch:
        """This rank's share of some of the pool's sequences."""
        parts = self._parts
        return take_share(parts.targets["target"], self._pool[start:stop], parts.seq_len, parts.device)

    def _exact(self, groups: slice) -> Tensor:
        """Alignments with the token mean over some groups, (B,)."""
        counts_G = self._counts_G[groups].to(self._columns_BG.device)
        return self._columns_BG[:, groups] @ counts_G / counts_G.sum()

    def _first(self, targets: int) -> Tensor:
        return self._exact(slice(0, targets // GROUP))

    def _compare(self, values_C: Tensor, positions_C: Tensor, reference_B: Tensor, same: bool = True) -> list[float]:
        aligned = centred_cosine(values_C, reference_B[positions_C])
        return [aligned, self._phi.cosine(values_C, positions_C, reference_B, same)]

    def _everywhere(self) -> Tensor:
        return torch.arange(len(self._columns_BG), device=self._columns_BG.device)

    def tables(self) -> Tables:
        """Everything at this point; the LM is left at another."""
        default = self._plan.settings["default"]
        tables: Tables = {}
        for precision in self._lowers:
            done = {name: [self._engine(precision, config)] for name, config in self._plan.settings.items()}
            tables[f"settings, {precision}"] = done
            tables[f"rank, {precision}"] = {
                str(rank): done["default"] if rank == default.rank else [self._engine(precision, lowrank)]
                for rank, lowrank in ((r, replace(default, estimator="ghost_lowrank", rank=r)) for r in RANKS)
            }
            tables[f"epsilon, {precision}"] = self._epsilons(precision, default.target_batch)
        tables["target_at, fp32"] = self._other_gradients(default.target_batch)
        tables["sampling, fp32"] = self._sampling()
        return tables

    def _engine(self, precision: str, config: BilevelConfig) -> list[float]:
        """A setting as the engine computes it; one that reuses target gradients was last there at the old moment."""
        lower, bilevel = self._lowers[precision], BilevelStep(self._lowers[precision], config)
        moments = [self._old, self._now] if config.reuse > 1 else [self._now]
        targets = {"target": self._targets(0, config.target_batch)}
        for update, moment in enumerate(moments):
            lower.restore(moment.state)
            bilevel.begin(moment.step, update, moment.batch, targets)
            result = lower.step(moment.step, moment.batch, self._weigher)
            found = bilevel.finish(moment.batch, result)
            lower.zero_grad()
        return self._compare(found.alignments_C, found.positions_C, self._first(config.target_batch))

    def _epsilons(self, precision: str, targets: int) -> Rows:
        """Finite differences of several lengths with the exact u."""
        fine, lower = self._lowers["fp32"], self._lowers[precision]
        fine.write(self._taken.moved)
        u = direction(fine, self._taken, target_gradient(fine, self._targets(0, targets)))
        lower.restore(self._now.state)
        taken = take(lower, self._now.step, self._now.batch, self._weigher)
        rows = {}
        for rule, epsilon in [("richardson", 0.0), *((r, e) for r in ("central", "one_sided") for e in EPSILONS)]:
            estimator = FiniteDifference(lower, BilevelConfig(epsilon=epsilon), rule)
            values_B = all_gather_rows(-taken.result.lr * estimator.contract(problem(lower, taken, u)))
            label = f"{rule} {epsilon:g}" if epsilon else rule
            rows[label] = [self._compare(values_B, self._everywhere(), self._first(targets))]
        return rows

    def _other_gradients(self, targets: int) -> Rows:
        """The exact contraction with a v of another LM than theta'."""
        lower, batch = self._lowers["fp32"], self._targets(0, targets)
        lower.restore(self._now.state)
        before = target_gradient(lower, batch)
        lower.restore(self._old.state)
        take(lower, self._old.step, self._old.batch, self._weigher)
        stale = target_gradient(lower, batch)
        lower.write(self._taken.moved)
        return {
            name: [self._compare(self._reference.alignments(v), self._everywhere(), self._first(targets))]
            for name, v in (("theta", before), (f"theta' of {AGE} steps ago", stale))
        }

    def _sampling(self) -> Rows:
        """Parts of the batch and of the pool, against all of both."""
        groups = self._columns_BG.shape[1]
        whole_B, rows = self._exact(slice(0, groups)), {}
        share = len(self._now.batch)
        for size in (*(s for s in SIZES if s <= groups * GROUP // 2), groups * GROUP):
            for stride in (s for s in STRIDES if s <= share and len(whole_B) // s >= 2):
                each, cosines = size // GROUP, []
                for draw in range(max(stride, min(DRAWS, groups // each)) if each < groups else stride):
                    part_B = self._exact(slice(draw * each % groups, draw * each % groups + each))
                    rows_b = torch.arange(draw % stride, share, stride, device=part_B.device)
                    positions_C = (
                        torch.arange(0, len(whole_B), share, device=rows_b.device)[:, None] + rows_b
                    ).flatten()
                    cosines.append(self._compare(part_B[positions_C], positions_C, whole_B, same=False))
                label = "all" if each == groups else str(size)
                rows[f"{label} targets, 1/{stride} of the batch"] = cosines
        return rows
