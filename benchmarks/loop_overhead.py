"""Our training loop against a bare torch FSDP2 loop: the same model, batch and optimizer, turn by turn.

    python benchmarks/loop_overhead.py

Ours reads shards, weighs (uniformly), logs every step and guards against NaN; the bare loop gets its batches
as ready tensors and does nothing else. The figure is the ratio of tokens per second, ours / bare.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from common import WARM_STEPS, make_shards, now, parser, run_config, run_ranks, spread, timed_fit, write_result
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaForCausalLM

from ray_dwm.config import RunConfig
from ray_dwm.engine.checks import check_data, seq_len
from ray_dwm.engine.mesh import device
from ray_dwm.models.lm import lm_config


def bare(config: RunConfig, steps: int) -> float:
    """Seconds of `steps` steps of what one would write by hand."""
    torch.manual_seed(0)
    train, world = config.train, dist.get_world_size()
    manifest = check_data(config)
    tokens = seq_len(config, manifest)
    model = LlamaForCausalLM(lm_config(config.lm.preset, vocab_size=manifest.vocab_size, seq_len=tokens))
    model = model.to(device())
    policy = MixedPrecisionPolicy()
    if train.precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    mesh = init_device_mesh(device().type, (world,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=train.lr, betas=(train.beta1, train.beta2), fused=True)
    shape = (train.global_batch // world, tokens)
    batches = torch.randint(0, manifest.vocab_size, (WARM_STEPS + steps, *shape), device=device())
    start = 0.0
    for step, ids in enumerate(batches):
        if step == WARM_STEPS:
            start = now()
        parts = ids.split(train.micro_batch)
        for part in parts:
            targets = F.pad(part[:, 1:], (0, 1), value=-100)  # shifting the logits instead would copy them
            logits = model(input_ids=part).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()) / len(parts)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    return now() - start


def measure(config: RunConfig, steps: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of every turn of both."""
    turns: dict[str, list[float]] = {"bare": [], "ours": []}
    for turn in range(rounds):
        for name, value in (("bare", bare(config, steps)), ("ours", timed_fit(config, steps, f"turn{turn}"))):
            turns[name].append(value)
    return turns


def main() -> None:
    """Command line."""
    args = parser("Our loop against a bare FSDP2 loop").parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_shards(Path(folder) / "train", 4 * args.global_batch, args.vocab, args.seq_len)
        config = run_config(args, Path(folder), "weighting.method=uniform")
        turns = run_ranks(measure, config.cluster.workers, config, args.steps, args.rounds)
    tokens = args.steps * args.global_batch * args.seq_len
    ratios = [b / o for b, o in zip(turns["bare"], turns["ours"], strict=True)]
    result: dict[str, Any] = {f"{name}_tokens_per_s": spread([tokens / s for s in turns[name]]) for name in turns}
    result["ours_over_bare"] = spread(ratios)
    for name, figures in result.items():
        print(f"{name:<22}" + "  ".join(f"{key} {value:,.3f}" for key, value in figures.items()))
    print(f"written to {write_result('loop_overhead', args, config, result)}")


if __name__ == "__main__":
    main()
