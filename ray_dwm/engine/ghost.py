"""Inner products with per-sequence gradients out of the LM's ordinary backward; no such gradient is ever formed.

A Linear y = W a has the gradient sum_t b_t a_t^T for a sequence, b_t being its output's gradient, so
<U, gradient> = sum_t b_t^T U a_t (Goodfellow 2015, arXiv 1510.01799, extended from norms to inner products). An
identity is hung behind every module that owns parameters; its backward sees a_t and b_t. What it needs is kept by
autograd's own means, so that activation checkpointing recomputes it instead of holding it.

Legend: m = sequences of a micro-batch, c = those of this rank that are contracted, T tokens, r rank of the sketch,
I, O = a matrix's inputs and outputs. An embedding's "input" is the one-hot token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ray_dwm.engine.clock import Stopwatch
from ray_dwm.engine.contraction import Problem, Shards, whole
from ray_dwm.engine.step import LowerLevel
from ray_dwm.errors import ConfigError, TrainingError
from ray_dwm.models.lm import Lm

Rule = Callable[[nn.Module, Tensor, Tensor, Tensor, int], None]
"""(module, input, output's gradient, places, start): both of the wanted sequences, from token `start` on, and the
sequences' places among the c. The LM calls its head once for each chunk of tokens, all others once."""


class _Tap(torch.autograd.Function):
    """The identity, whose backward hands the module's input and its output's gradient to a function."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, source: Tensor, see: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(source)
        ctx.see = see
        return output.detach()  # not a view: FSDP warns of a root that returns one

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        with torch.no_grad():
            ctx.see(ctx.saved_tensors[0], grads[0])
        return grads[0], None, None


class Watcher:
    """Shows every parameter-owning module's input and output gradient to a rule, micro-batch by micro-batch."""

    def __init__(self, model: Lm, rule: Rule) -> None:
        self._model, self._rule = model, rule
        self._owners = owners(model)
        self._rows_c = torch.empty(0, dtype=torch.long)
        self._seen = self._expected = self._sights = 0
        self._handles: list[RemovableHandle] = []
        self._watch = Stopwatch()

    def start(self, rows_c: Tensor) -> None:
        """Watch the backward passes from now on, which bring this rank's sequences in order."""
        self._remove()
        self._watch.reset()
        torch.compiler.set_stance("force_eager")  # nothing can be hung behind a module within compiled code
        self._rows_c = rows_c
        self._seen = self._expected = self._sights = 0
        self._handles = [self._model.register_forward_pre_hook(self._next, with_kwargs=True)]
        self._handles += [module.register_forward_hook(self._tap) for module in self._owners]

    def stop(self) -> None:
        """Leave the LM as it was, compiled if it was.

        Raises:
            TrainingError: a module's backward was not seen.
        """
        self._remove()
        if self._sights != self._expected or not self._expected:
            raise TrainingError(
                f"the ghost estimators saw {self._sights} of {self._expected} backward passes of the LM's modules: a "
                "bug, report it, and set bilevel.estimator to one_sided or central; the last checkpoint is intact"
            )

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        torch.compiler.set_stance("default")

    @property
    def seconds(self) -> float:
        """Duration of what the rule did since `start`."""
        return self._watch.seconds

    def _next(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled():
            return
        size, tokens = (args[0] if args else kwargs["input_ids"]).shape
        inside = (self._rows_c >= self._seen) & (self._rows_c < self._seen + size)
        self._places_k = inside.nonzero().squeeze(1)
        self._wanted_k = self._rows_c[self._places_k] - self._seen
        self._seen += size
        self._tokens = dict.fromkeys(map(id, self._owners), 0)
        chunks = -(-tokens // self._model.chunk(size, tokens))
        # Also where none is wanted: another rank may want one, and a rule may be collective.
        self._expected += len(self._owners) - 1 + chunks

    def _tap(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        wanted_k, places_k, start = self._wanted_k, self._places_k, self._tokens[id(module)]
        # Where the backward calls the module again, it is the first call's node that sees the gradient.
        self._tokens[id(module)] += args[0].shape[1]

        def see(source: Tensor, gradient: Tensor) -> None:
            self._sights += 1
            with self._watch.passage():
                if len(wanted_k) < len(source):
                    source, gradient = source[wanted_k], gradient[wanted_k]
                self._rule(module, source, gradient, places_k, start)

        return _Tap.apply(output, args[0], see)


def owners(model: Lm) -> list[nn.Module]:
    """The modules that own a parameter.

    Raises:
        ConfigError: one of them is of a kind that has no rule.
    """
    found = [module for module in model.modules() if any(True for _ in module.parameters(recurse=False))]
    for module in found:
        known = isinstance(module, (nn.Linear, nn.Embedding, LlamaRMSNorm))
        if not known or getattr(module, "bias", None) is not None:
            raise ConfigError(
                f"the ghost estimators have no rule for a {type(module).__name__} of this LM: set "
                "bilevel.estimator to one_sided or central"
            )
    return found


def parameter_index(lower: LowerLevel) -> dict[int, int]:
    """id of a module that owns a parameter -> the parameter's place in `lower.parameters`.

    By module, and made while the LM is sharded: FSDP puts another object in the parameter's place where it is gathered.
    """
    places = {id(p): index for index, p in enumerate(lower.parameters)}
    return {id(m): places[id(next(m.parameters(recurse=False)))] for m in owners(lower.model)}


def inner(x_kTd: Tensor, y_kTd: Tensor) -> Tensor:
    """Inner products of sequences in fp32, (k,)."""
    x_kN, y_kN = x_kTd.float().flatten(1), y_kTd.float().flatten(1)
    return torch.bmm(x_kN[:, None], y_kN[:, :, None]).flatten()


def ghost_dots(module: nn.Module, direction: Tensor, source: Tensor, gradient: Tensor) -> Tensor:
    """<U, gradient of the module's weight> for every sequence, (k,), fp32.

    Args:
        direction: U, shaped like the module's weight.
        source: the module's input: (k, T, I), token ids (k, T) for an Embedding.
        gradient: of its output, (k, T, O).
    """
    if isinstance(module, nn.Embedding):
        return inner(gradient, direction[source])
    if isinstance(module, LlamaRMSNorm):
        x_kTd = source.float()
        return inner(gradient, normalised(x_kTd, module.variance_epsilon) * direction.float())
    outputs, inputs = direction.shape
    # Whichever side is narrower: behind the head, T x vocabulary numbers would be the largest tensor of all.
    if outputs <= inputs:
        return inner(gradient, F.linear(source, direction))
    return inner(gradient @ direction, source)


def normalised(x: Tensor, epsilon: float) -> Tensor:
    """x over its root mean square."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon)


class Ghost:
    """<u, grad l_i(theta)> with a u that is known before the backward: one more product per matrix, no extra pass.

    Every matrix of u is gathered when the backward reaches it, and dropped again.
    """

    needs_theta = False

    def __init__(self, lower: LowerLevel) -> None:
        self._index = parameter_index(lower)
        self._lower, self._watcher = lower, Watcher(lower.model, self._see)
        self._dots_c, self._direction = torch.empty(0), list[Tensor]()

    @property
    def watch_seconds(self) -> float:
        """See Estimator."""
        return self._watcher.seconds

    def watch(self, rows_c: Tensor, direction: Shards | None) -> None:
        """See Estimator."""
        assert direction is not None, "ghost contracts in the backward"
        self._direction, self._dots_c = direction, torch.zeros(len(rows_c), device=rows_c.device)
        self._watcher.start(rows_c)

    def _see(self, module: nn.Module, source: Tensor, gradient: Tensor, places_k: Tensor, start: int) -> None:
        del start
        index = self._index[id(module)]
        local = self._direction[index].to(gradient.dtype)  # before it is gathered, as FSDP does with the weights
        matrix = whole(self._lower.parameters[index], local)
        self._dots_c[places_k] += ghost_dots(module, matrix, source, gradient)

    def stop(self) -> None:
        """See Estimator."""
        self._watcher.stop()
        self._direction = []

    def contract(self, problem: Problem) -> Tensor:
        """See Estimator."""
        return unscaled(self._dots_c, problem.scale_c)


def unscaled(values: Tensor, scale_c: Tensor) -> Tensor:
    """Values of the weighted backward for the sequences' own losses; 0 where a weight has underflowed to 0."""
    scale_c = scale_c.view(-1, *[1] * (values.dim() - 1))
    return torch.where(scale_c == 0, torch.zeros_like(values), values / scale_c)
