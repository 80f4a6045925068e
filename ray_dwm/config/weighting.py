"""The sections of the run configuration that say how sequences get their weights, and how a DWM is learnt."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from ray_dwm.config.building import below_one, frozen, not_negative, positive, require
from ray_dwm.config.group_dro import GroupDroConfig


@frozen
class WeightingConfig:
    """What gives the sequences of a global batch their weights; the fields are those of the online baselines."""

    method: Literal["dwm", "uniform", "loss", "joint_update_aware", "group_dro"] = "dwm"
    """dwm: learnt (sections dwm and bilevel). uniform: plain training. loss: a function of the sequences' losses.
    joint_update_aware: likeness to the target set, less redundancy. group_dro: by domain, in a game against the LM.
    docs/baselines.md has formulas and sources."""
    strategy: Literal["linupper", "quadratic", "extremes"] = "linupper"
    """Which losses `loss` prefers: all but the low ones, medium ones, or the lowest and highest."""
    r: float = 0.4
    """Temperature of `loss`: the largest weight is at most exp(1 / r) times the smallest."""
    r_warmup_steps: int = 0
    """LM steps with uniform weights before `loss` begins."""
    r_anneal_steps: int = 0
    """LM steps after the warm-up in which 1 / r grows linearly from 0; 0 switches at once."""
    beta: float = 0.1
    """Penalty of `joint_update_aware` on sequences that resemble one another."""
    tau: float = 0.05
    """Temperature of `joint_update_aware`, in units of a cosine."""
    anchor_every: int = 50
    """LM steps between two refreshes of the anchor of `joint_update_aware`."""
    anchor_sequences: int = 32
    """Target sequences whose mean embedding is the anchor, drawn afresh for each refresh, over all workers."""
    group_dro: GroupDroConfig = field(default_factory=GroupDroConfig)

    def __post_init__(self) -> None:
        positive("weighting", self, "r", "tau", "anchor_every", "anchor_sequences")
        not_negative("weighting", self, "r_warmup_steps", "r_anneal_steps", "beta")


@frozen
class DwmConfig:
    """The Data Weighting Model and its optimizer."""

    control: Literal["none", "random", "shuffled", "shuffled_target"] = "none"
    """Null controls: the DWM is learnt, but what is applied says nothing about the data. random: random weights as far
    from uniform (in KL) as the DWM's. shuffled: the DWM's weights dealt out at random within the batch.
    shuffled_target: the DWM's weights, learnt from alignments that were dealt out at random within the batch."""
    mode: Literal["learn", "adapt", "frozen", "replay"] = "learn"
    """adapt: learn on from init_from, which must be named; frozen: init_from as it is; replay: trajectory's versions,
    by fraction of training. The last two need no actor."""
    init_from: str = ""
    """A DWM folder to start from."""
    trajectory: str = ""
    """The dwm folder of a run that learnt a DWM."""
    size: Literal["xs", "s", "m", "l"] = "xs"
    batch_attention: bool = True
    """false: an ablation, each sequence is scored by itself; the softmax alone still sees the batch."""
    lm_features: bool = False
    """Also look at every sample's current LM loss and entropy (costs a forward where micro-batches accumulate)."""
    lr: float = 3e-3
    weight_decay: float = 0.01
    clip_norm: float = 0.1
    """Clipping threshold of the hypergradient dJ/dphi, which has no unit; 0 switches clipping off. Small on purpose:
    one batch of outliers must not undo what many taught."""
    temperature: float = 1.0
    floor: float = 0.0
    delay_steps: int = 1
    """LM steps between a bi-level step and the use of the DWM version it made."""
    trajectory_points: int = 50
    """Points of training, evenly spread, at which the applied version is written to the run folder's dwm/."""
    look_ahead: bool = False
    """Weigh the next batch beside the LM's step, on a GPU on a stream of its own; delay_steps must be at least 1."""
    min_ess_fraction: float = 0.05
    """The run stops where (ESS - 1) / (B - 1) is below this in more than ten steps in a row: the weights have
    collapsed."""
    min_entropy: float = 0.8
    """A warning is printed where the weights' entropy over log B falls below this."""

    def __post_init__(self) -> None:
        positive("dwm", self, "lr", "temperature", "trajectory_points")
        not_negative("dwm", self, "clip_norm", "weight_decay", "delay_steps")
        below_one("dwm", self, "floor", "min_ess_fraction", "min_entropy")
        require(
            not (self.look_ahead and (self.delay_steps == 0 or self.lm_features or not self.learns)),
            "dwm.look_ahead weighs a batch before the LM has seen it and the newest version is there: it needs "
            "dwm.delay_steps >= 1, dwm.lm_features=false and dwm.mode=learn or adapt",
        )
        require(
            self.learns or self.control != "shuffled_target",
            f"dwm.control=shuffled_target is about learning, but dwm.mode={self.mode} does not learn",
        )
        require(
            self.mode not in ("adapt", "frozen") or bool(self.init_from),
            f"dwm.mode={self.mode} needs dwm.init_from, a DWM folder",
        )
        require(
            self.mode != "replay" or bool(self.trajectory), "dwm.mode=replay needs dwm.trajectory, a run's dwm folder"
        )

    @property
    def learns(self) -> bool:
        """Whether the DWM is learnt, from wherever it starts."""
        return self.mode in ("learn", "adapt")


@frozen
class BilevelConfig:
    """The upper level: when and how the hypergradient is estimated."""

    every: int = 10
    """LM steps between two bi-level steps; 0 lets max_overhead choose it, and the target batch, from measured times."""
    max_overhead: float = 0.05
    """Where every is 0: time of what the DWM adds over time of plain training; target_batch is then the most."""
    warmup_steps: int = 20
    """LM steps before the first bi-level step."""
    stages: int = 0
    """Stages of equal length, at whose start the DWM is learnt and then stays, instead of every N steps; 0: none."""
    stage_updates: int = 10
    """Bi-level steps in a row at the start of each stage."""
    stage_lm: Literal["update", "hold"] = "update"
    """hold: while the DWM is learnt the LM is put back after every step; those batches do not train it."""
    estimator: Literal["ghost_lowrank", "one_sided", "central", "ghost", "jvp", "exact"] = "ghost_lowrank"
    """How the inner products are computed; docs/bilevel.md has measured costs and errors."""
    rank: int = 32
    """Rank of ghost_lowrank's sketches."""
    target_at: Literal["theta_prime", "theta"] = "theta_prime"
    """Where the target gradient is taken: after the LM's step, as defined, or before it, which ghost needs."""
    preconditioner: Literal["optimizer", "none"] = "optimizer"
    """none: an ablation, alignments as if the LM's optimizer were plain SGD; D = 1 in docs/bilevel.md."""
    target_batch: int = 8
    """Target sequences drawn afresh for each bi-level step, over all workers and target sets."""
    target_sequences: int = 0
    """Sequences of each target set from which these are drawn, spread evenly over it; 0: all. Evaluation takes all."""
    target_weights: dict[str, float] = field(default_factory=dict)
    """Name of a target set -> its weight in the target loss (1 where it is not named); they are normalised."""
    fraction: float = 1.0
    """Part of the training batch that is contracted: 1/m with m a divisor of train.global_batch."""
    reuse: int = 1
    """Bi-level steps that use one target gradient."""
    max_staleness: int = 50
    """LM steps after which a reused target gradient is computed anew."""
    kl: float = 1.0
    """Pull to uniform weights, in units of the alignments' standard deviation."""
    updates: int = 2
    """Optimizer steps of the DWM per bi-level step."""
    scale_decay: float = 0.9
    """Memory of the running variance by which alignments are standardised."""
    epsilon: float = 0.0
    """Length |h u| of a finite difference's perturbation; 0 means 1e-2 in fp32, 1e-1 in bf16 (it rounds more)."""
    fidelity_every: int = 20
    """Bi-level steps between two checks of the estimator against a better one; 0 switches them off."""
    fidelity_sequences: int = 16
    """Training sequences, over all workers, on which it is checked."""
    min_fidelity: float = 0.0
    """A warning is printed where the fidelity falls below this; 0 never warns."""

    def __post_init__(self) -> None:
        positive("bilevel", self, "stage_updates", "max_overhead", "target_batch", "updates", "rank", "reuse")
        positive("bilevel", self, "max_staleness", "fidelity_sequences")
        not_negative("bilevel", self, "every", "stages", "epsilon", "kl", "fidelity_every", "target_sequences")
        below_one("bilevel", self, "scale_decay", "min_fidelity")
        require(
            self.fidelity_sequences >= 4,
            f"bilevel.fidelity_sequences is {self.fidelity_sequences}: a cosine after centring needs at least 4",
        )
        require(
            self.every > 0 or self.stages == 0,
            "bilevel.stages and bilevel.every=0 exclude each other: stages fix when the DWM is learnt, set every",
        )
        require(self.stage_lm == "update" or self.stages > 0, "bilevel.stage_lm=hold needs bilevel.stages")
        for name, weight in self.target_weights.items():
            require(weight >= 0, f"bilevel.target_weights.{name} is {weight}: it must not be negative")
        require(
            self.warmup_steps >= 1,
            f"bilevel.warmup_steps is {self.warmup_steps}: it must be at least 1, at Adam's first step the "
            "hypergradient is noise",
        )
        require(
            self.estimator != "ghost" or self.target_at == "theta",
            "bilevel.estimator=ghost contracts inside the LM's backward, before theta' exists: set "
            "bilevel.target_at=theta, or use ghost_lowrank",
        )
