"""`ghost_lowrank`: sketches of every sequence's gradient out of the ordinary backward, contracted after the step.

`ghost` must know u before the backward, but u depends on the step that the backward makes. Here the backward only
leaves a sketch P^T G_i Q (r x r) of every matrix's gradient G_i, and u, exact and at theta', is contracted
with the sketches afterwards: <u, G_i> ~ <P^T u Q, P^T G_i Q>. P and Q span the leading directions of the optimizer's
momentum, to which single gradients and u are close, and which is there before the step.

Two parts of the gradient are sparse in the vocabulary, badly approximated by any few directions, and cheap to get
right, so they are exact: the rows of the input embedding, and the labels' rows of the head. For the latter, with h_t
the head's input and y_t the label, G_i = sum_t (p_t - onehot(y_t)) h_t^T / tokens: only the p_t part is sketched.

RMSNorm gains are left out: there are few of them.

Legend: c = contracted sequences of this rank, T tokens, r rank, d the LM's width, I, O = a matrix's inputs and outputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from ray_dwm.engine.contraction import Problem, Shards, whole
from ray_dwm.engine.ghost import Watcher, inner, owners, parameter_index, unscaled
from ray_dwm.engine.mesh import Layout, shard
from ray_dwm.engine.step import LowerLevel

_MOMENTUM = {"adamw": "exp_avg", "sgd": "momentum_buffer"}


@dataclass(frozen=True, slots=True)
class Subspace:
    """Leading directions of one matrix, whole on every rank."""

    left: Tensor
    """P, (O, r)"""
    right: Tensor
    """Q, (I, r)"""


class GhostLowRank:
    """<u, grad l_i(theta)> from sketches; see the module's docstring.

    Memory: per contracted sequence r^2 numbers for each matrix and 2 T d for the embedding and the head; and, one after
    the other, the whole u of the embedding and of the head.
    """

    needs_theta = False

    def __init__(self, lower: LowerLevel, rank: int) -> None:
        self._lower, self._rank, self._layout = lower, rank, lower.layout
        self._index = parameter_index(lower)
        self._embedding = self._index[id(lower.model.model.embed_tokens)]
        self._head = self._index[id(lower.model.lm_head)]
        self._sketched = sorted({self._index[id(m)] for m in owners(lower.model) if isinstance(m, nn.Linear)})
        self._watcher = Watcher(lower.model, self._see)
        self._starts: dict[int, Tensor] = {}
        self._spaces: dict[int, Subspace] = {}
        self._sketches: dict[int, Tensor] = {}
        self._embedded: dict[int, Tensor] = {}
        """First token -> gradients of what the embedding looked up, (c, C, d)."""
        self._hidden: dict[int, Tensor] = {}
        """First token of a chunk -> what the head was given, (c, C, d)."""

    @property
    def watch_seconds(self) -> float:
        """See Estimator."""
        return self._watcher.seconds

    @torch.no_grad()
    def watch(self, rows_c: Tensor, direction: Shards | None) -> None:
        """See Estimator."""
        del direction
        self._spaces = self._subspaces()
        self._count = len(rows_c)
        self._sketches, self._embedded, self._hidden = {}, {}, {}
        self._watcher.start(rows_c)

    def _see(self, module: nn.Module, source: Tensor, gradient: Tensor, places_k: Tensor, start: int) -> None:
        index = self._index[id(module)]
        if isinstance(module, nn.Embedding):
            self._keep(self._embedded, start, gradient, places_k)
        elif isinstance(module, nn.Linear):
            space = self._spaces[index]
            outputs_kTr = gradient @ space.left.to(gradient.dtype)
            inputs_kTr = source @ space.right.to(source.dtype)
            sketch_krr = torch.bmm(outputs_kTr.float().mT, inputs_kTr.float())
            if index not in self._sketches:
                self._sketches[index] = sketch_krr.new_zeros(self._count, *sketch_krr.shape[1:])
            self._sketches[index][places_k] += sketch_krr
            if module is self._lower.model.lm_head:
                self._keep(self._hidden, start, source, places_k)
        else:
            assert isinstance(module, LlamaRMSNorm)

    def _keep(self, kept: dict[int, Tensor], start: int, values_kTd: Tensor, places_k: Tensor) -> None:
        if start not in kept:
            kept[start] = values_kTd.new_zeros(self._count, *values_kTd.shape[1:])
        kept[start][places_k] = values_kTd.detach()

    def stop(self) -> None:
        """See Estimator."""
        self._watcher.stop()

    @torch.no_grad()
    def contract(self, problem: Problem) -> Tensor:
        """See Estimator."""
        cores = self._cores(problem.direction)
        dots_c = torch.zeros_like(problem.losses_c)
        for index, sketch_crr in self._sketches.items():
            dots_c += torch.einsum("crs,rs->c", sketch_crr, cores[index])
        dots_c = unscaled(dots_c, problem.scale_c) + self._labels(problem, cores[self._head])
        embedding = whole(self._lower.parameters[self._embedding], problem.direction[self._embedding])
        ids_cT, gradients_cTd = problem.batch.input_ids, _in_order(self._embedded)
        looked_up = [inner(g[None], embedding[i][None]) for g, i in zip(gradients_cTd, ids_cT, strict=True)]
        dots_c += unscaled(torch.cat(looked_up), problem.scale_c)
        self._sketches, self._embedded, self._hidden, self._spaces = {}, {}, {}, {}
        return dots_c

    def _labels(self, problem: Problem, core_rr: Tensor) -> Tensor:
        """What the labels' part of the head's gradient has more than its sketch, (c,)."""
        batch, space = problem.batch, self._spaces[self._head]
        matrix = whole(self._lower.parameters[self._head], problem.direction[self._head])
        dots = []
        for h_Td, ids_T, mask_T in zip(_in_order(self._hidden), batch.input_ids, batch.mask, strict=True):
            labels_k, h_kd = ids_T[1:][mask_T], h_Td[:-1][mask_T].float()
            missed_kd = matrix[labels_k] - (space.left[labels_k] @ core_rr) @ space.right.T
            # Times -1 / tokens for each counted label: the derivative of its cross-entropy in its own logit.
            dots.append(-torch.sum(h_kd * missed_kd) / problem.tokens)
        return torch.stack(dots)

    def _cores(self, direction: Shards) -> dict[int, Tensor]:
        """P^T u Q of every sketched matrix."""
        local = {}
        for index, space in self._spaces.items():
            rows = space.left[_place(len(space.left), self._layout)]
            local[index] = rows.T @ direction[index] @ space.right
        return _all_sum(local, self._layout)

    def _subspaces(self) -> dict[int, Subspace]:
        """Leading left and right directions of the momentum: a randomised range finder with one power iteration.

        Halko, Martinsson and Tropp 2011, algorithms 4.1 and 4.4. Every rank holds a part of the rows.
        """
        name, layout = _MOMENTUM[self._lower.config.optimizer], self._layout
        parameters = self._lower.parameters
        local = {i: shard(self._lower.optimizer.state[parameters[i]][name]) for i in self._sketched}
        right = _orthonormal(_all_sum({i: m.T @ (m @ self._start(m)) for i, m in local.items()}, layout))
        rows = _orthonormal({i: m @ right[i] for i, m in local.items()}, by_rows_of=layout)
        right = _orthonormal(_all_sum({i: m.T @ rows[i] for i, m in local.items()}, layout))
        left = _gather({i: (len(parameters[i]), x) for i, x in rows.items()}, layout)
        return {i: Subspace(left[i], right[i]) for i in local}

    def _start(self, matrix: Tensor) -> Tensor:
        inputs = matrix.shape[1]
        if inputs not in self._starts:
            generator = torch.Generator().manual_seed(0)  # the same on every rank
            self._starts[inputs] = torch.randn(inputs, min(self._rank, inputs), generator=generator).to(matrix)
        return self._starts[inputs]


def _in_order(kept: dict[int, Tensor]) -> Tensor:
    """Whole sequences, (c, T, d), from chunks of tokens."""
    return torch.cat([kept[start] for start in sorted(kept)], dim=1)


def _orthonormal(matrices: dict[int, Tensor], by_rows_of: Layout | None = None) -> dict[int, Tensor]:
    """Orthonormal bases of the matrices' columns, from their Gram matrices, twice (Yamamoto et al. 2015, CholeskyQR2).

    Args:
        by_rows_of: every rank of a copy holds a part of the rows, and gets that of the basis.
    """
    for _ in range(2):
        grams = {i: y.double().T @ y.double() for i, y in matrices.items()}
        grams = _all_sum(grams, by_rows_of) if by_rows_of else grams
        matrices = {i: (y.double() @ _inverse_factor(grams[i])).to(y.dtype) for i, y in matrices.items()}
    return matrices


def _inverse_factor(gram_rr: Tensor) -> Tensor:
    """A with A^T G A = 1; what is added to G lets directions that it lacks come out small instead of failing."""
    size, device = len(gram_rr), gram_rr.device
    eye_rr = torch.eye(size, dtype=gram_rr.dtype, device=device)
    regular_rr = gram_rr + (1e-14 * gram_rr.diagonal().mean() + 1e-300) * eye_rr
    factor_rr = torch.linalg.cholesky_ex(regular_rr)[0]
    return torch.linalg.solve_triangular(factor_rr, eye_rr, upper=False).T


def _place(rows: int, layout: Layout) -> slice:
    """The rows of a matrix that are this rank's, as Shard(0) deals them out."""
    per_rank = -(-rows // layout.shards)
    return slice(min(rows, layout.shard * per_rank), min(rows, (layout.shard + 1) * per_rank))


def _gather(parts: dict[int, tuple[int, Tensor]], layout: Layout) -> dict[int, Tensor]:
    """Whole matrices of (number of rows, this rank's rows), in one collective."""
    padded = {}
    for index, (rows, part) in parts.items():
        padded[index] = part.new_zeros(rows, part.shape[1])
        padded[index][_place(rows, layout)] = part
    return _all_sum(padded, layout)


def _all_sum(values: dict[int, Tensor], layout: Layout) -> dict[int, Tensor]:
    """Sums over the ranks of a copy, in one collective."""
    flat = layout.sum(torch.cat([x.flatten() for x in values.values()]))
    parts = flat.split([x.numel() for x in values.values()])
    return {index: part.view_as(x) for (index, x), part in zip(values.items(), parts, strict=True)}
