"""Gradient features per second: ours against traker's own loop, on the same proxy LM, sequences and number of features.

    python benchmarks/selection_dsdm.py
    python benchmarks/selection_dsdm.py --features 256 --rounds 1   # a quick look

Turn by turn each contender projects the gradients of the same sequences. `traker` is TRAKer.featurize of traker 0.3.2,
batch by batch: gradients by vmap and, on a CPU or without fast_jl, its BasicProjector, which makes its matrix anew for
every batch, 100 columns at a time. `dense` and `factored` are selection.dsdm.projection. Under vmap all attend by the
math kernel, since the others have no rule for it. Processor time, of a CPU, says what other processes cannot disturb.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from common import now, parser, run_config, spread, write_result
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from trak import TRAKer
from trak.modelout_functions import AbstractModelOutput
from transformers import LlamaForCausalLM

from ray_dwm.engine.mesh import device
from ray_dwm.models.lm import lm_config
from ray_dwm.selection.gradients import PROJECTIONS, losses

Contender = Callable[[list[Tensor]], Tensor]
"""Batches of token ids -> features."""


def all_count(ids_nT: Tensor) -> Tensor:
    """Every prediction counts."""
    return torch.ones_like(ids_nT[:, 1:], dtype=torch.bool)


class LogLikelihood(AbstractModelOutput):
    """What traker is to differentiate."""

    def __init__(self) -> None:
        pass

    @staticmethod
    def get_output(model: nn.Module, weights: Any, buffers: Any, ids: Tensor) -> Tensor:
        """Of one sequence."""
        logits = functional_call(model, (weights, buffers), (ids[None],), {"use_cache": False}).logits
        return -losses(logits, ids[None], all_count(ids[None]))[0]

    def get_out_to_loss_grad(self, model: nn.Module, weights: Any, buffers: Any, batch: tuple[Tensor]) -> Tensor:
        """The same for all."""
        del model, weights, buffers
        return torch.ones(len(batch[0]), 1)


def traker(model: nn.Module, k: int, sequences: int, folder: Path) -> Contender:
    """traker's own loop; every turn is a checkpoint of its own."""
    theirs = TRAKer(
        model=model,
        task=LogLikelihood(),
        train_set_size=sequences,
        save_dir=str(folder / "traker"),
        device=str(device()),
        proj_dim=k,
        use_half_precision=False,
        logging_level="ERROR",
    )

    def features(batches: list[Tensor]) -> Tensor:
        theirs.load_checkpoint(model.state_dict(), model_id=len(theirs.saver.model_ids))
        with sdpa_kernel(SDPBackend.MATH):
            for ids in batches:
                theirs.featurize((ids,), num_samples=len(ids))
        return torch.from_numpy(theirs.saver.current_store["grads"].copy())

    return features


def ours(model: nn.Module, k: int, projection: str) -> Contender:
    """A projection of selection.dsdm."""

    def features(batches: list[Tensor]) -> Tensor:
        return torch.cat([PROJECTIONS[projection](model, ids, all_count(ids), k, 0) for ids in batches])

    return features


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Sequences/s of all contenders, turn by turn."""
    config = lm_config(args.preset, vocab_size=args.vocab, seq_len=args.seq_len)
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).float().eval().requires_grad_(False).to(device())
    batches = list(torch.randint(args.vocab, (args.sequences, args.seq_len), device=device()).split(args.batch))
    contenders: dict[str, Contender] = {"traker": traker(model, args.features, args.sequences, folder)}
    contenders |= {name: ours(model, args.features, name) for name in PROJECTIONS}
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    processor: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(args.rounds + 1):
        for name, features in contenders.items():
            started, used = now(), time.process_time()
            found = features(batches)
            seconds, used = now() - started, time.process_time() - used
            assert found.shape == (args.sequences, args.features)
            if turn:  # the first one warms up
                rates[name].append(args.sequences / seconds)
                processor[name].append(used)
    result: dict[str, Any] = {f"{name}_sequences_per_s": spread(values) for name, values in rates.items()}
    for name in PROJECTIONS:
        ratios = [a / b for a, b in zip(rates[name], rates["traker"], strict=True)]
        result[f"{name}_over_traker"] = spread(ratios)
        spared = [b / a for a, b in zip(processor[name], processor["traker"], strict=True)]
        result[f"traker_over_{name}_processor_time"] = spread(spared)
    return {"traker": version("traker"), "parameters": sum(p.numel() for p in model.parameters()), **result}


def main() -> None:
    """Command line."""
    p = parser("Gradient features against traker", rounds=5)
    p.add_argument("--features", type=int, default=4096)
    p.add_argument("--sequences", type=int, default=32, help="of one turn")
    p.add_argument("--batch", type=int, default=32, help="sequences in one pass")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as name:
        config = run_config(args, Path(name), "weighting.method=uniform")
        result = measure(args, Path(name))
    for key, value in result.items():
        print(f"{key:<38}{value}")
    print(f"written to {write_result('selection_dsdm', args, config, result)}")


if __name__ == "__main__":
    main()
