"""The only place where parallelism is applied to the LM."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaForCausalLM


def parallelize(model: LlamaForCausalLM, mesh: DeviceMesh, precision: str) -> LlamaForCausalLM:
    """Shard every decoder layer, then the rest, with FSDP2; parameters stay fp32, bf16 is for computing.

    Gradients are reduced in fp32.
    """
    policy = MixedPrecisionPolicy()
    if precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model
