"""Contenders of table `peers`: our engine, and libraries that differentiate through the optimizer's step.

Every contender takes the same AdamW step of the same LM, without clipping, and computes dL_target/dw, w being the
weights of the training batch's sequences. The peers build the step's graph and go backward through it, which needs
second derivatives and therefore the MATH attention kernel; ours needs first derivatives only and is what trains:
LowerLevel and BilevelStep, under FSDP2 in a process group of one.

Legend: B = sequences of the training batch, b = of the target batch, T = tokens of a sequence.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from common import zipf_tokens
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaForCausalLM

from ray_dwm.config import BilevelConfig, ParallelConfig, TrainConfig
from ray_dwm.core.losses import predicted_mask, sample_losses, token_losses
from ray_dwm.engine.batch import Batch
from ray_dwm.engine.bilevel import BilevelStep
from ray_dwm.engine.mesh import device, init_mesh
from ray_dwm.engine.parallelize import parallelize
from ray_dwm.engine.step import LowerLevel
from ray_dwm.models.lm import Lm, build_lm, lm_config

PEERS = {"torchopt": "0.7.3", "higher": "0.2.1"}
"""Name and the version that the adapters were written for."""
BETAS, EPS, WEIGHT_DECAY = (0.9, 0.95), 1e-8, 0.1


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """What a contender is asked; sizes as in the module's legend. Tokens and weights are random."""

    preset: str
    vocab: int
    seq_len: int
    batch: int
    target_batch: int
    warm_steps: int = 5
    """Plain AdamW steps before the one in question: Adam's first step is sign-like."""
    lr: float = 1e-3

    def model(self) -> LlamaForCausalLM:
        """The LM before its warm steps, as transformers has it."""
        lm = self.lm()
        plain = LlamaForCausalLM(lm.config)
        plain.load_state_dict(lm.state_dict())
        return plain.to(device())

    def lm(self) -> Lm:
        """The same as ours."""
        return build_lm(lm_config(self.preset, vocab_size=self.vocab, seq_len=self.seq_len), seed=0)

    def tokens(self, sequences: int, domains: int, seed: int) -> Tensor:
        """A batch of token ids; every token but a sequence's first is predicted."""
        generator = torch.Generator().manual_seed(seed)
        return zipf_tokens(self.vocab, sequences, self.seq_len, domains, generator).to(device())

    def batches(self) -> tuple[Tensor, Tensor]:
        """Training and target batch; the target is of one of the two domains."""
        return self.tokens(self.batch, 2, 0), self.tokens(self.target_batch, 1, 1)

    def weights(self) -> Tensor:
        """Weights of the training batch's sequences, (B,)."""
        return torch.softmax(torch.randn(self.batch, generator=torch.Generator().manual_seed(2)), 0).to(device())


@dataclass(frozen=True, slots=True)
class Contender:
    """A step that can be taken again and again."""

    turn: Callable[[], Tensor]
    """Takes the step (the LM ends at theta') and returns dL_target/dw, (B,), in nats per unit of weight."""
    keep: Callable[[], Callable[[], None]]
    """Remembers the state; what it returns puts it back."""


@dataclass(frozen=True, slots=True)
class Start:
    """State before the step, without our engine: an LM and an AdamW after the warm steps, and the step's batches."""

    model: LlamaForCausalLM
    optimizer: torch.optim.AdamW
    ids_BT: Tensor
    target_ids_bT: Tensor
    weights_B: Tensor


def make_start(problem: Problem) -> Start:
    """The problem's LM after its warm steps."""
    model = problem.model()
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=problem.lr, betas=BETAS, eps=EPS)
    start = Start(model, optimizer, *problem.batches(), problem.weights())
    uniform_B = torch.full_like(start.weights_B, 1 / problem.batch)
    for step in range(problem.warm_steps):
        ids_BT = problem.tokens(problem.batch, 2, 100 + step)
        plain_turn(replace(start, ids_BT=ids_BT, weights_B=uniform_B))()
    return start


def bare(make_turn: Callable[[Start], Callable[[], Tensor]], problem: Problem) -> Contender:
    """A contender without our engine."""
    start = make_start(problem)
    slots = [x for state in start.optimizer.state.values() for x in state.values()]
    tensors = [p.detach() for p in start.model.parameters()] + slots

    def keep() -> Callable[[], None]:
        return partial(torch._foreach_copy_, tensors, [x.clone() for x in tensors])

    return Contender(make_turn(start), keep)


class _Given:
    """Weights that are given."""

    statistics = "none"

    def __init__(self, weights_B: Tensor) -> None:
        self._weights_B = weights_B

    def weigh(self, batch: Batch, statistics_bS: Tensor | None) -> tuple[Tensor, Tensor]:
        """See Weighting."""
        return self._weights_B, self._weights_B


def engine(bilevel: BilevelConfig | None, problem: Problem) -> Contender:
    """Our step, with what BilevelStep adds to it or, without a configuration of that, without."""
    config = TrainConfig(
        global_batch=problem.batch,
        micro_batch=max(problem.batch, problem.target_batch),
        lr=problem.lr,
        beta1=BETAS[0],
        beta2=BETAS[1],
        eps=EPS,
        weight_decay=WEIGHT_DECAY,
        clip_norm=0.0,
        schedule="constant",
        warmup_steps=0,
    )
    mesh = init_mesh()
    lower = LowerLevel(parallelize(problem.lm(), mesh, "fp32", ParallelConfig()), mesh, config)
    for step in range(problem.warm_steps):
        lower.step(step, _batch(problem.tokens(problem.batch, 2, 100 + step)), None)
        lower.zero_grad()
    batch, target = (_batch(ids) for ids in problem.batches())
    weighting: Any = _Given(problem.weights())
    upper = BilevelStep(lower, bilevel) if bilevel else None

    def turn() -> Tensor:
        if upper is not None:
            upper.begin(problem.warm_steps, 0, batch, {"target": target})
        result = lower.step(problem.warm_steps, batch, weighting)
        found = result.losses_b if upper is None else upper.finish(batch, result).alignments_C
        lower.zero_grad()
        return found

    def keep() -> Callable[[], None]:
        return partial(lower.restore, lower.everything())

    return Contender(turn, keep)


def _batch(ids_BT: Tensor) -> Batch:
    nothing_B = torch.zeros(len(ids_BT), dtype=torch.long)
    return Batch(nothing_B, nothing_B, ids_BT, predicted_mask(None, ids_BT))


def losses(model: Callable[..., Any], ids_BT: Tensor) -> Tensor:
    """l_i of every sequence in nats per token, shape (B,)."""
    losses_BT = token_losses(model(input_ids=ids_BT).logits, ids_BT)
    return sample_losses(losses_BT, predicted_mask(None, ids_BT), ids_BT.shape[1] - 1)


def _at(model: LlamaForCausalLM, names: Sequence[str], values: Sequence[Tensor]) -> Callable[..., Any]:
    """The model as a function of its inputs at other parameters than its own."""
    swapped = dict(zip(names, values, strict=True))
    return lambda **inputs: torch.func.functional_call(model, swapped, (), inputs, tie_weights=True)


def plain_turn(start: Start) -> Callable[[], Tensor]:
    """The step alone, as one would write it by hand; returns the losses, not a hypergradient."""

    def turn() -> Tensor:
        losses_B = losses(start.model, start.ids_BT)
        (start.weights_B @ losses_B).backward()
        start.optimizer.step()
        start.optimizer.zero_grad()
        return losses_B.detach()

    return turn


def through_torchopt(start: Start) -> Callable[[], Tensor]:
    """torchopt's functional AdamW, starting from the torch optimizer's moments.

    Differences from torch.optim.AdamW that this evens out:
        - its `mask` of weight decay fails in the flattened chain that adamw() builds: the decay is applied here;
        - the derivative of sqrt is 0 * inf where the second moment is 0 (rows of an untied embedding that no batch
          has touched): eps_root = 1e-30, which no other entry feels.
    """
    import torchopt
    from torchopt.transform.scale_by_adam import ScaleByAdamState

    model, lr = start.model, start.optimizer.param_groups[0]["lr"]
    names, parameters = zip(*model.named_parameters(), strict=True)
    decay = {p: group["weight_decay"] for group in start.optimizer.param_groups for p in group["params"]}
    optimizer = torchopt.adamw(lr=lr, betas=BETAS, eps=EPS, weight_decay=0.0, eps_root=1e-30)

    def moments(state: Any) -> Any:
        if not isinstance(state, ScaleByAdamState):
            return state
        kept = [start.optimizer.state[p] for p in parameters]
        mu, nu = tuple(s["exp_avg"].clone() for s in kept), tuple(s["exp_avg_sq"].clone() for s in kept)
        return ScaleByAdamState(mu, nu, tuple(c + int(s["step"]) for c, s in zip(state.count, kept, strict=True)))

    state = tuple(moments(s) for s in optimizer.init(parameters))

    def turn() -> Tensor:
        theta = tuple(p.detach().requires_grad_() for p in parameters)
        weights_B = start.weights_B.clone().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH):
            objective = weights_B @ losses(_at(model, names, theta), start.ids_BT)
            grads = torch.autograd.grad(objective, theta, create_graph=True)
            # Not in place: that would overwrite what the backward pass needs.
            updates, _ = optimizer.update(grads, state, params=theta, inplace=False)
            decayed = tuple(x * (1 - lr * decay[p]) for x, p in zip(theta, parameters, strict=True))
            moved = torchopt.apply_updates(decayed, updates, inplace=False)
            (alignments_B,) = torch.autograd.grad(
                losses(_at(model, names, moved), start.target_ids_bT).mean(), weights_B
            )
        torch._foreach_copy_([p.detach() for p in parameters], [m.detach() for m in moved])
        return alignments_B

    return turn


def through_higher(start: Start) -> Callable[[], Tensor]:
    """higher's inner loop, one step long; the patched model and optimizer are made anew each time, as higher does.

    What LlamaForCausalLM and AdamW need beyond higher 0.2.1:
        - a patched ModuleList cannot be sliced, which Llama's forward does: its __getitem__ is replaced;
        - there is no AdamW: one is registered, on top of its Adam.
    """
    import higher

    higher.register_optim(torch.optim.AdamW, _differentiable_adamw(higher.optim.DifferentiableAdam))
    model, optimizer = start.model, start.optimizer

    def turn() -> Tensor:
        weights_B = start.weights_B.clone().requires_grad_()
        with sdpa_kernel(SDPBackend.MATH), higher.innerloop_ctx(model, optimizer) as (fmodel, stepper):
            type(fmodel.model.layers).__getitem__ = lambda self, index: list(self._modules.values())[index]
            stepper.step(weights_B @ losses(fmodel, start.ids_BT))
            (alignments_B,) = torch.autograd.grad(losses(fmodel, start.target_ids_bT).mean(), weights_B)
            moved = [p.detach() for p in fmodel.fast_params]
        torch._foreach_copy_([p.detach() for p in model.parameters()], moved)
        return alignments_B

    return turn


def _differentiable_adamw(adam: type) -> type:
    """A subclass of higher's Adam that computes what torch.optim.AdamW does."""

    class DifferentiableAdamW(adam):  # type: ignore[misc]
        def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
            kept = [(group["weight_decay"], group["eps"]) for group in self.param_groups]
            for group, states in zip(self.param_groups, self.state, strict=True):
                group["params"] = [p * (1 - group["lr"] * group["weight_decay"]) for p in group["params"]]
                group["weight_decay"] = 0.0
                # higher adds eps to the root of the uncorrected moment.
                group["eps"] *= (1 - group["betas"][1] ** (int(states[0]["step"]) + 1)) ** 0.5
            super()._update(grouped_grads, **kwargs)
            for group, (decay, eps) in zip(self.param_groups, kept, strict=True):
                group["weight_decay"], group["eps"] = decay, eps

    return DifferentiableAdamW


CONTENDERS: dict[str, Callable[[Problem], Contender]] = {
    "plain": partial(bare, plain_turn),
    "engine": partial(engine, None),
    "ours": partial(engine, BilevelConfig(fidelity_every=0)),
    "central": partial(engine, BilevelConfig(fidelity_every=0, estimator="central")),
    "torchopt": partial(bare, through_torchopt),
    "higher": partial(bare, through_higher),
    "exact": partial(engine, BilevelConfig(fidelity_every=0, estimator="jvp")),
}
"""plain and engine are the step alone: what the peers' and our hypergradients are on top of. exact, by `jvp`, is what
all are compared with."""


def installed(name: str) -> bool:
    """Whether a contender can run here; only a peer may be missing."""
    return name not in PEERS or importlib.util.find_spec(name) is not None
