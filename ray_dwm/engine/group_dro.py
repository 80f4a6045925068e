"""Group DRO over the training set's domains in the DWM's place; with a reference LM it is DoReMi's proxy.

The mathematics is in core/group_dro.py. Legend: D = domains, B = sequences of the global batch, b = this rank's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ray_dwm.config import RunConfig
from ray_dwm.core import group_dro
from ray_dwm.core.weighting import log_relative, normalised_entropy
from ray_dwm.data.manifest import Manifest
from ray_dwm.engine.batch import Batch
from ray_dwm.engine.learner import State
from ray_dwm.engine.mesh import all_gather_rows, is_main
from ray_dwm.engine.messages import say
from ray_dwm.engine.weighting import Statistics
from ray_dwm.errors import Collapsed, ConfigError, NotFinite

if TYPE_CHECKING:  # what is checked before a run needs no transformers
    from ray_dwm.models.lm import Lm

_FEW_STEPS = 20
"""In a row, in which one domain may have nearly all however short the run is: at the start gaps are wide."""


class GroupDroWeighting:
    """The adversary's domain weights, updated from each global batch before the LM's step on it."""

    statistics: Statistics = "tokens"

    def __init__(self, config: RunConfig, train: Manifest, reference: Lm | None) -> None:
        """Before the first step.

        Args:
            reference: frozen, laid out like the LM; None: losses as they are.
        """
        self._config, self._options, self._reference = config, config.weighting.group_dro, reference
        self._names = train.domain_names
        rows = torch.tensor([train.domains[name].rows for name in self._names], dtype=torch.float64)
        self._expected_D = config.train.global_batch * rows / rows.sum()
        self._presence_D = group_dro.presence(rows / rows.sum(), config.train.global_batch)
        self._state = group_dro.start(initial_weights(config, self._names))
        self._step, self._alarmed, self._told = 0, False, False

    def advance(self, step: int) -> None:
        """See Weighting."""
        self._step = step
        if self._told:
            return
        self._told = True
        rare = [name for name, n in zip(self._names, self._expected_D.tolist(), strict=True) if n < 1]
        if rare:
            self._say(
                f"warning: a global batch has less than one sequence of {', '.join(rare)} on average: their weights "
                "will be noisy, raise train.global_batch"
            )

    @torch.no_grad()
    def weigh(self, batch: Batch, statistics_bS: Tensor | None) -> tuple[Tensor, Tensor]:
        """See Weighting.

        Raises:
            TrainingError: a loss is not finite, or one domain has had nearly all the weight for too long.
        """
        assert statistics_bS is not None
        reference_bT = self._reference_losses(batch)
        sums_b = group_dro.excess_sums(statistics_bS, reference_bT, batch.mask)
        counted_b = batch.mask.sum(dim=1)
        columns = torch.stack([sums_b.double(), counted_b.double(), batch.domains.to(sums_b.device).double()], dim=1)
        # On the CPU in double precision, from the same numbers in the same order: all ranks agree exactly.
        sums_B, tokens_B, codes_B = all_gather_rows(columns)[: self._config.train.global_batch].cpu().T
        self._require_finite(sums_B, statistics_bS)
        codes_B = codes_B.long()
        sums_D, tokens_D = (group_dro.domain_sums(x_B, codes_B, len(self._names)) for x_B in (sums_B, tokens_B))
        o = self._options
        self._state = group_dro.update(
            self._state, sums_D, tokens_D, eta=o.eta, smoothing=o.smoothing, min_entropy=o.min_entropy
        )
        self._guard()
        weights_B = group_dro.sequence_weights(self._state.alpha_D, self._presence_D, tokens_B, codes_B)
        weights_B = weights_B.float().to(statistics_bS.device)
        return log_relative(weights_B), weights_B

    def _reference_losses(self, batch: Batch) -> Tensor | None:
        if self._reference is None:
            return None
        parts = batch.micro_batches(self._config.train.micro_batch)
        return torch.cat([self._reference(part.input_ids).losses_bT for part in parts])

    def _require_finite(self, sums_B: Tensor, losses_bT: Tensor) -> None:
        if bool(sums_B.isfinite().all()):
            return
        proxy = bool(all_gather_rows(losses_bT.isfinite().all()[None]).all())
        name = "the LM's loss" if not proxy else f"the loss of weighting.group_dro.reference={self._options.reference}"
        remedy = "lower train.lr" if not proxy else "train that LM anew with a lower train.lr, or name another"
        raise NotFinite(f"{name} is not finite at step {self._step}: it has diverged, {remedy}")

    def _guard(self) -> None:
        o, state = self._options, self._state
        if state.collapsed == 0:
            return
        top = self._names[int(state.alpha_D.argmax())]
        remedy = "lower weighting.group_dro.eta or raise weighting.group_dro.smoothing"
        if state.collapsed > max(_FEW_STEPS, o.max_collapsed * self._config.train.steps):
            raise Collapsed(
                f"the domain weights have collapsed: at step {self._step} {top} has had nearly all for "
                f"{state.collapsed} steps in a row, over weighting.group_dro.max_collapsed = {o.max_collapsed:g} of "
                f"train.steps: {remedy}"
            )
        if not self._alarmed:
            self._alarmed = True
            self._say(
                f"warning: at step {self._step} the domain weights' entropy is below weighting.group_dro.min_entropy = "
                f"{o.min_entropy:g} of log D, {top} has nearly all: where it stays so, {remedy}"
            )

    def _say(self, text: str) -> None:
        if is_main():
            say(self._config.run_dir, text)

    @property
    def metrics(self) -> dict[str, float]:
        """Weight now, average weight and last excess loss of every domain, and the entropies of both over log D."""
        state = self._state
        figures = {
            "group_dro/entropy": float(normalised_entropy(state.alpha_D)),
            "group_dro/average_entropy": float(normalised_entropy(state.average_D)),
        }
        columns = {"alpha": state.alpha_D, "average": state.average_D, "excess": state.excess_D}
        for column, values_D in columns.items():
            for name, value in zip(self._names, values_D.tolist(), strict=True):
                if value == value:  # a domain that was never seen has no excess
                    figures[f"group_dro/{column}/{name}"] = value
        return figures

    def state_dict(self, step: int) -> State:
        """See Weighting."""
        del step
        s = self._state
        counters = torch.tensor([s.updates, s.collapsed])
        return {"alpha": s.alpha_D, "average": s.average_D, "excess": s.excess_D, "counters": counters}

    def load_state_dict(self, step: int, state: State) -> None:
        """See Weighting."""
        del step
        alpha_D, average_D, excess_D = (state[name].clone() for name in ("alpha", "average", "excess"))
        self._state = group_dro.Dro(alpha_D, average_D, excess_D, *state["counters"].tolist())


def initial_weights(config: RunConfig, names: list[str]) -> Tensor:
    """Domain weights at the start, (D,), in the order of the names; not normalised.

    Raises:
        ConfigError: one domain, or weights for other domains than those of the training set.
    """
    if len(names) < 2:
        raise ConfigError(f"{config.data.train} has one domain, {names[0]}: Group DRO needs several")
    given = config.weighting.group_dro.initial
    if not given:
        return torch.ones(len(names), dtype=torch.float64)
    other = sorted(given.keys() ^ set(names))
    if other:
        where = "has no weight" if other[0] in names else f"is no domain of {config.data.train}"
        raise ConfigError(
            f"weighting.group_dro.initial: {other[0]} {where}, the domains are {', '.join(names)}: name them all"
        )
    return torch.tensor([given[name] for name in names], dtype=torch.float64)
