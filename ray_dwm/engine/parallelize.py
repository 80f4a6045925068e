"""The only place where the LM is laid out over devices and their memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.utils.checkpoint import CheckpointPolicy, SelectiveCheckpointContext, create_selective_checkpoint_contexts

from ray_dwm.config import ParallelConfig
from ray_dwm.models.lm import Lm

aten = torch.ops.aten
_DEAR = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
}
"""What `selective` keeps: the products and the attention, most of a block's time and a third of its memory."""

_VARIANTS = 64
"""Compilations that a piece of code may have. What is compiled for the first shape as it is, then for all shapes, is
that once for one sequence and for several, for whole chunks and the last one, with gradients and without: more than
Dynamo's own limit of 8, beyond which `fullgraph` is an error."""


def parallelize(model: Lm, mesh: DeviceMesh, precision: str, config: ParallelConfig) -> Lm:
    """Activation checkpointing, torch.compile and FSDP2, in this order, for every block; then FSDP2 for the rest.

    Parameters, gradients and their sums over ranks are fp32; bf16 is for computing.
    """
    blocks = model.model.layers
    if config.activation_checkpointing != "none":
        again: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # there is no dropout
        if config.activation_checkpointing == "selective":
            again["context_fn"] = partial(create_selective_checkpoint_contexts, _keep_dear)
        # The second is the first one's name in older transformers.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable(again)
    if config.compile:
        torch._dynamo.config.recompile_limit = _VARIANTS
        for block in blocks:
            block.compile(fullgraph=True)
        model.cross_entropy = torch.compile(model.cross_entropy, fullgraph=True)
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if config.cpu_offload else OffloadPolicy()
    shard = partial(fully_shard, mesh=mesh, mp_policy=policy, offload_policy=offload)
    for block in blocks:
        shard(block, reshard_after_forward=config.reshard_after_forward)
    shard(model)
    return model


def _keep_dear(context: SelectiveCheckpointContext, operator: object, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    del context, args, kwargs
    return CheckpointPolicy.MUST_SAVE if operator in _DEAR else CheckpointPolicy.PREFER_RECOMPUTE
