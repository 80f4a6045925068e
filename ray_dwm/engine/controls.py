"""Null controls of the DWM: weights, or alignments, that say nothing about the data.

All chance is a pure function of (config.seed, LM step): the same on all ranks, after a resume and for any world size.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ray_dwm.config import RunConfig
from ray_dwm.core.reweighting import entropy_matched_random_weights, shuffled
from ray_dwm.core.weighting import kl_to_uniform, weights_from_scores

_SALT = 101
"""Keeps these streams apart from those of the read plan, which are keyed by the same seed and 0, 1 or 2."""


def generator(seed: int, step: int) -> torch.Generator:
    """The source of chance of LM step `step`, on the CPU."""
    (state,) = np.random.SeedSequence((seed, _SALT, step)).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state))


def applied_weights(control: str, weights_B: Tensor, seed: int, step: int) -> Tensor:
    """What is applied where the DWM gave `weights_B`: the same for `none` and `shuffled_target`."""
    if control == "random":
        # Rounding must not push it out of [0, log B), which fully collapsed weights would reach.
        target_kl = float(kl_to_uniform(weights_B.double()).clamp(min=0.0))
        target_kl = min(target_kl, (1 - 1e-6) * math.log(weights_B.numel()))
        return entropy_matched_random_weights(target_kl, weights_B.numel(), generator(seed, step)).to(weights_B)
    return shuffled(weights_B, generator(seed, step)) if control == "shuffled" else weights_B


def dwm_weights(config: RunConfig, scores_B: Tensor, step: int) -> Tensor:
    """What LM step `step` applies of the DWM's scores, (B,): its weights, or what a null control makes of them."""
    dwm = config.dwm
    weights_B = weights_from_scores(scores_B, dwm.temperature, dwm.floor)
    return applied_weights(dwm.control, weights_B, config.seed, step)


def learnt_alignments(control: str, alignments_B: Tensor, seed: int, step: int) -> Tensor:
    """What the DWM learns from where the bi-level step found `alignments_B`: the same but for `shuffled_target`."""
    return shuffled(alignments_B, generator(seed, step)) if control == "shuffled_target" else alignments_B
