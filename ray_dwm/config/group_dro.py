"""The section `weighting.group_dro` of the run configuration: Group DRO over the training set's domains."""

from __future__ import annotations

from dataclasses import field

from ray_dwm.config.building import below_one, frozen, not_negative, positive, require


@frozen
class GroupDroConfig:
    """Domain weights by a minimax game with the LM (DoReMi's proxy, Xie et al. 2023, arXiv 2305.10429)."""

    reference: str = ""
    """Run folder or Hugging Face folder of the reference LM, over whose loss the excess is taken. Empty: raw losses,
    plain Group DRO (Sagawa et al. 2019, arXiv 1911.08731), which prefers what is hard, noise too."""
    eta: float = 1.0
    """Step size of the domain weights, as published; 0, with smoothing 0, keeps them as they are."""
    smoothing: float = 1e-3
    """Part of the weights that is dealt out evenly at every step, as in the paper; its code has 1e-4."""
    initial: dict[str, float] = field(default_factory=dict)
    """Domain -> weight at the start; empty: all the same, as published."""
    min_entropy: float = 0.05
    """A warning is printed where the domain weights' entropy over log D falls below this: one domain has nearly all."""
    max_collapsed: float = 0.25
    """The run stops where the same domain has nearly all for this part of the run's steps in a row."""

    def __post_init__(self) -> None:
        not_negative("weighting.group_dro", self, "eta")
        below_one("weighting.group_dro", self, "smoothing", "min_entropy")
        positive("weighting.group_dro", self, "max_collapsed")
        for name, weight in self.initial.items():
            require(weight > 0, f"weighting.group_dro.initial.{name} is {weight}: it must be greater than 0")
