"""The bi-level step of a small Llama, which tests take apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ray_dwm.config import RunConfig
from ray_dwm.core.weighting import standardise, upper_objective, weights_from_scores, whole_batch
from ray_dwm.data.plan import target_rows
from ray_dwm.data.shards import open_shards
from ray_dwm.engine.batch import Batch, take_share
from ray_dwm.engine.bilevel import BilevelStep
from ray_dwm.engine.checks import check_data, read_plan
from ray_dwm.engine.mesh import all_gather_rows, shard
from ray_dwm.engine.parts import Parts
from ray_dwm.engine.setup import build
from ray_dwm.engine.weighting import GivenWeights
from ray_dwm.models.dwm import build_dwm, dwm_shape

STEPS, TARGETS = 4, 8


def local(parts: Parts, folder: str, rows: np.ndarray) -> Batch:
    return take_share(open_shards(folder), rows, 16, parts.device)


def train_batch(parts: Parts, step: int) -> Batch:
    """This rank's share of a training batch."""
    plan = read_plan(parts.config, check_data(parts.config))
    return local(parts, parts.config.data.train, plan.rows(step))


def target_batch(parts: Parts) -> Batch:
    """This rank's share of the target batch."""
    folder = parts.config.data.target
    return local(parts, folder, target_rows(open_shards(folder).manifest.rows, TARGETS, 0, 0))


def alignments(config: RunConfig) -> dict[str, Any]:
    """Alignments of step STEPS over the global batch, their phi-gradient, and whether theta' was left as it was."""
    parts = build(config)
    bilevel = BilevelStep(parts.lower, config.bilevel)
    for step in range(STEPS):
        parts.lower.step(step, train_batch(parts, step), None)
        parts.lower.zero_grad()
    batch = train_batch(parts, STEPS)
    bilevel.begin(STEPS, 0, batch, {"target": target_batch(parts)})
    result = parts.lower.step(STEPS, batch, None)
    after = [shard(p).clone() for p in parts.lower.parameters]
    outcome = bilevel.finish(batch, result)
    values = outcome.alignments_C
    restored = all(torch.equal(a, shard(p)) for a, p in zip(after, parts.lower.parameters, strict=True))
    phi = phi_gradient(all_gather_rows(batch.input_ids)[:8], values, outcome.positions_C)
    figures = outcome.figures
    return {"values": values, "restored": restored, "norm": result.grad_norm, "phi": phi, "figures": figures}


def phi_gradient(ids: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """dJ/dphi, flat, of a DWM whose score head is not zero."""
    model = build_dwm(dwm_shape("xs", 64), seed=0)
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(1))
    standard, _ = standardise(values, 0.0, 0.9)
    standard = whole_batch(standard, positions, len(ids))
    upper_objective(weights_from_scores(model(ids)), standard, 0.1).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Cosine after centring."""
    a, b = a.double(), b.double()
    return float(torch.nn.functional.cosine_similarity(a - a.mean(), b - b.mean(), dim=0))


def moved(size: int, index: int, h: float) -> GivenWeights:
    """Uniform weights with one moved by h."""
    weights = torch.full((size,), 1.0 / size)
    weights[index] += h
    return GivenWeights(weights)
