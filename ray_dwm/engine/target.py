"""v, the gradient of the target loss: of several weighted sets, kept for several bi-level steps where that is asked."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ray_dwm.config import BilevelConfig
from ray_dwm.engine.batch import Batch
from ray_dwm.engine.contraction import Shards, placed, shards_of
from ray_dwm.engine.mesh import all_sum, shard
from ray_dwm.engine.step import LowerLevel, batch_losses, forward_losses, tokens_per_sample

Targets = dict[str, Batch]
"""This rank's share of the target batch of every target set."""


class TargetGradient:
    """Makes v = grad L_target where the LM stands, L_target being the weighted mean of the sets' token means."""

    def __init__(self, lower: LowerLevel, config: BilevelConfig) -> None:
        self._lower, self._config = lower, config
        self._parameters = lower.parameters
        self.forget()

    def forget(self) -> None:
        """Free it."""
        self.step = -1
        """The LM step at which v was made."""
        self.v: Shards = []
        """In fp32."""
        self.by_set: dict[str, Shards] = {}
        """Where there is more than one set."""

    def due(self, step: int, update: int) -> bool:
        """Whether it must be made anew: at every `reuse`-th update, or when it is too old."""
        fresh = bool(self.v) and step - self.step <= self._config.max_staleness
        return not fresh or update % self._config.reuse == 0

    def make(self, step: int, targets: Targets) -> None:
        """Make it."""
        self.v, self.by_set = self.gradient(targets)
        self.step = step

    def gradient(self, targets: Targets) -> tuple[Shards, dict[str, Shards]]:
        """(v, that of every set where there are several); keeps nothing."""
        by_set = {}
        for name, batch in targets.items():
            tokens = tokens_per_sample(batch, 1)  # of all its sequences: the l_i sum up to the token mean
            for part in batch.micro_batches(self._lower.config.micro_batch):
                losses_m = forward_losses(self._lower.model, part, tokens)
                (dist.get_world_size() * losses_m.sum()).backward()
            by_set[name] = shards_of(self._parameters)
            self._lower.zero_grad()
        if len(by_set) == 1:
            return by_set.popitem()[1], {}
        shares = target_shares(self._config, list(targets))
        combined = [torch.zeros_like(shard(p)) for p in self._parameters]
        for name, v in by_set.items():
            torch._foreach_add_(combined, v, alpha=shares[name])
        return combined, by_set

    def loss(self, targets: Targets) -> float:
        """L_target where the LM stands."""
        shares = target_shares(self._config, list(targets))
        total = 0.0
        for name, batch in targets.items():
            tokens = tokens_per_sample(batch, 1)
            losses_b = batch_losses(self._lower.model, batch, self._lower.config.micro_batch, tokens)
            total += shares[name] * float(all_sum(losses_b.double().sum()))
        return total

    def state_dict(self, sets: list[str]) -> dict[str, Tensor]:
        """What a checkpoint must keep: what the next updates will use again."""
        if self._config.reuse == 1:
            return {}
        state = {"step": torch.tensor(self.step)}
        kept = {"v": self.v}
        if len(sets) > 1:
            kept |= {f"v_{name}": self.by_set.get(name, []) for name in sets}
        for key, values in kept.items():
            values = values or [torch.zeros_like(shard(p)) for p in self._parameters]
            state |= {f"{key}.{i}": placed(p, x) for i, (p, x) in enumerate(zip(self._parameters, values, strict=True))}
        return state

    def load_state_dict(self, sets: list[str], state: dict[str, Tensor]) -> None:
        """Take over what `state_dict` gave."""
        if not state or int(state["step"]) < 0:
            return

        def shards(key: str) -> Shards:
            return [shard(state[f"{key}.{i}"]) for i in range(len(self._parameters))]

        self.step, self.v = int(state["step"]), shards("v")
        self.by_set = {name: shards(f"v_{name}") for name in sets} if len(sets) > 1 else {}


def target_shares(config: BilevelConfig, sets: list[str]) -> dict[str, float]:
    """Share of every target set in L_target, by `bilevel.target_weights`; they sum to 1."""
    weights = {name: config.target_weights.get(name, 1.0) for name in sets}
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}
