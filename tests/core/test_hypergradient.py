"""The closed form against autograd through the optimizer's own arithmetic, and against hand-derived problems."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from ray_dwm.core import estimators
from ray_dwm.core.hypergradient import adamw_gain, adamw_jacobian, clip_coefficient, clip_transpose, sgd_jacobian
from ray_dwm.core.weighting import upper_objective, weights_from_scores

LR, WEIGHT_DECAY, BETA1, BETA2, EPS = 0.05, 0.1, 0.9, 0.95, 1e-8
SAMPLES, WIDTH = 5, 4


def problem(seed: int) -> tuple[Tensor, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """theta, per-sample losses and target loss of a small nonlinear regression in fp64."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(SAMPLES, WIDTH, dtype=torch.float64, generator=g)
    y = torch.randn(SAMPLES, dtype=torch.float64, generator=g)
    xt = torch.randn(3, WIDTH, dtype=torch.float64, generator=g)
    yt = torch.randn(3, dtype=torch.float64, generator=g)
    theta = torch.randn(WIDTH, dtype=torch.float64, generator=g)
    return (
        theta,
        lambda p: (torch.tanh(x @ p) - y).square(),
        lambda p: (torch.tanh(xt @ p) - yt).square().mean(),
    )


def clip(g: Tensor, max_norm: float) -> Tensor:
    """clip_grad_norm_ as differentiable arithmetic."""
    return g * torch.clamp(max_norm / (g.norm() + 1e-6), max=1.0) if max_norm else g


def step(kind: str, theta: Tensor, g: Tensor, state: dict[str, Tensor]) -> Tensor:
    """One differentiable optimizer step; `state` is replaced by the state after it."""
    state["t"] = state["t"] + 1
    if kind == "sgd":
        return theta - LR * (g + WEIGHT_DECAY * theta)
    if kind == "momentum":
        g = g + WEIGHT_DECAY * theta
        state["buffer"] = g if state["t"] == 1 else 0.9 * state["buffer"] + g
        return theta - LR * state["buffer"]
    state["m"] = BETA1 * state["m"] + (1 - BETA1) * g
    state["v"] = BETA2 * state["v"] + (1 - BETA2) * g.square()
    m_hat = state["m"] / (1 - BETA1 ** state["t"])
    v_hat = state["v"] / (1 - BETA2 ** state["t"])
    return theta * (1 - LR * WEIGHT_DECAY) - LR * m_hat / (v_hat.sqrt() + EPS)


# Not Adam's first step: it is sign-like, and the hypergradient 0/0.
KINDS_AND_STEPS = [(k, n) for k in ("sgd", "momentum", "adamw") for n in (0, 1, 7) if (k, n) != ("adamw", 0)]


@pytest.mark.parametrize(("kind", "warm_steps"), KINDS_AND_STEPS)
@pytest.mark.parametrize("max_norm", [0.0, 0.1, 1e6])
def test_closed_form_equals_autograd_through_the_step(kind: str, max_norm: float, warm_steps: int) -> None:
    theta, losses, target = problem(seed=warm_steps)
    zeros = torch.zeros(WIDTH, dtype=torch.float64)
    state = {"t": torch.tensor(0.0, dtype=torch.float64), "m": zeros, "v": zeros, "buffer": zeros}
    for index in range(warm_steps):
        p = (theta + 0.1 * index).requires_grad_()
        (g,) = torch.autograd.grad(losses(p).mean(), p)
        theta = step(kind, theta, clip(g, max_norm), state).detach()
        state = {k: x.detach() for k, x in state.items()}

    z = torch.linspace(-1, 1, SAMPLES, dtype=torch.float64).requires_grad_()
    w = weights_from_scores(z)
    p = theta.clone().requires_grad_()
    grads = torch.stack([torch.autograd.grad(li, p, retain_graph=True)[0] for li in losses(p)])
    g = w @ grads
    moved = step(kind, theta, clip(g, max_norm), state)
    expected_w, expected_z = torch.autograd.grad(target(moved), [w, z])

    g, n = g.detach(), float(g.detach().norm())
    assert max_norm == 0.0 or (n > max_norm) == (max_norm == 0.1), "0.1 must clip, 1e6 must not"
    clipped = clip(g, max_norm)
    (v,) = torch.autograd.grad(target(q := moved.detach().requires_grad_()), q)
    if kind == "adamw":
        m, vv = state["m"].detach(), state["v"].detach()
        d = adamw_jacobian(clipped, m, vv, int(state["t"]), BETA1, BETA2, EPS)
    else:
        d = sgd_jacobian(0.9 if kind == "momentum" else 0.0, 0.0, False, first_step=warm_steps == 0)
    u = clip_transpose(d * v, g, float(g @ (d * v)), n, max_norm)
    alignments = -LR * grads @ u
    torch.testing.assert_close(alignments, expected_w, rtol=1e-9, atol=1e-15)
    z2 = z.detach().requires_grad_()
    upper_objective(weights_from_scores(z2), alignments, 0.0).backward()
    torch.testing.assert_close(z2.grad, expected_z, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("max_norm", [0.0, 0.8])
def test_quadratic_problem_by_hand(max_norm: float) -> None:
    """l_i = |theta - c_i|^2 / 2, target |theta - t|^2 / 2, SGD with clipping, KL: dJ/dz written out in full.

    With g = theta - sum_i w_i c_i and theta' = theta - lr k g, k = max_norm / (n + 1e-6) or 1:
    dL/dw_i = -lr (theta - c_i)^T K (theta' - t), K = k I, where clipped less max_norm / (n + 1e-6)^2 g g^T / n.
    """
    c = torch.tensor([[1.0, 0.0, 2.0], [-2.0, 1.0, 0.0], [0.5, -1.5, 1.0], [0.0, 0.3, -0.7]], dtype=torch.float64)
    t = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
    theta = torch.tensor([3.0, -0.5, 1.0], dtype=torch.float64)
    z = torch.tensor([0.3, -0.4, 0.9, 0.0], dtype=torch.float64)
    kl, tau = 0.7, 1.5

    w = (z / tau).exp() / (z / tau).exp().sum()
    g = theta - w @ c
    n = float((g * g).sum().sqrt())
    k = max_norm / (n + 1e-6) if max_norm else 1.0
    curl = max_norm / (n + 1e-6) ** 2 * torch.outer(g, g) / n if max_norm else torch.zeros(3, 3, dtype=torch.float64)
    a = -LR * (theta - c) @ (k * torch.eye(3, dtype=torch.float64) - curl) @ (theta - LR * k * g - t)
    slope = a + kl * ((4 * w).log() + 1)
    by_hand = w * (slope - (w * slope).sum()) / tau

    assert max_norm == 0.0 or n > max_norm, "the clipping must be active"
    moved = theta - LR * clip(g, max_norm)
    d = (moved - t) * sgd_jacobian(0.0, 0.0, False, first_step=False)
    u = clip_transpose(d, g, float(g @ d), n, max_norm)
    ours = -LR * estimators.exact(lambda p: (p[0] - c).square().sum(dim=1) / 2, [theta], [u])
    torch.testing.assert_close(ours, a, rtol=1e-12, atol=0.0)
    scores = z.clone().requires_grad_()
    upper_objective(weights_from_scores(scores, tau), ours, kl).backward()
    torch.testing.assert_close(scores.grad, by_hand, rtol=1e-12, atol=1e-16)


def test_no_factor_of_adams_jacobian_underflows() -> None:
    """fp32 against fp64 where gradient, moments and eps are tiny."""
    g = torch.tensor([1e-18, 1e-12, 1e-3])
    m, v = 0.03 * g, 0.05 * g.square()  # not those of a first step, where D cancels
    single = adamw_jacobian(g, m, v, 5, BETA1, BETA2, 1e-15)
    double = adamw_jacobian(g.double(), m.double(), v.double(), 5, BETA1, BETA2, 1e-15)
    torch.testing.assert_close(single.double(), double, rtol=1e-3, atol=0.0)


def test_entries_without_gradient_do_not_contribute() -> None:
    g = torch.tensor([0.0, 1e-3], dtype=torch.float64)
    d = adamw_jacobian(g, torch.zeros(2, dtype=torch.float64), g.square() * 0.05, 3, BETA1, BETA2, EPS)
    assert d[0] == 0.0
    assert torch.isfinite(d).all()


@pytest.mark.parametrize(
    ("norm", "max_norm", "expected"), [(2.0, 1.0, 1.0 / (2.0 + 1e-6)), (0.5, 1.0, 1.0), (9.0, 0.0, 1.0)]
)
def test_clip_coefficient_is_torchs(norm: float, max_norm: float, expected: float) -> None:
    assert clip_coefficient(norm, max_norm) == pytest.approx(expected, rel=1e-15)
    if max_norm:
        p = torch.nn.Parameter(torch.zeros(1))
        p.grad = torch.tensor([norm])
        torch.nn.utils.clip_grad_norm_([p], max_norm)
        assert float(p.grad) == pytest.approx(norm * expected)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_agrees_with_torchopt(kind: str) -> None:
    torchopt = pytest.importorskip("torchopt", reason="the oracle extra is not installed: pip install -e '.[oracle]'")
    theta, losses, target = problem(seed=3)
    if kind == "sgd":
        optimizer = torchopt.sgd(lr=LR)
    else:
        optimizer = torchopt.adamw(lr=LR, betas=(BETA1, BETA2), eps=EPS, weight_decay=WEIGHT_DECAY)
    params = (theta.clone().requires_grad_(),)
    state = optimizer.init(params)
    m = v_moment = torch.zeros(WIDTH, dtype=torch.float64)
    for _ in range(3):
        grads = torch.autograd.grad(losses(params[0]).mean(), params)
        m, v_moment = BETA1 * m + (1 - BETA1) * grads[0], BETA2 * v_moment + (1 - BETA2) * grads[0].square()
        updates, state = optimizer.update(grads, state, params=params, inplace=False)
        params = tuple(p.detach().requires_grad_() for p in torchopt.apply_updates(params, updates, inplace=False))
    w = torch.softmax(torch.linspace(-1, 1, SAMPLES, dtype=torch.float64), 0).requires_grad_()
    grads_i = torch.stack([torch.autograd.grad(li, params[0], retain_graph=True)[0] for li in losses(params[0])])
    g = w @ grads_i
    updates, _ = optimizer.update((g,), state, params=params, inplace=False)
    moved = torchopt.apply_updates(params, updates, inplace=False)[0]
    (expected,) = torch.autograd.grad(target(moved), w)

    (v,) = torch.autograd.grad(target(q := moved.detach().requires_grad_()), q)
    g = g.detach()
    m, v_moment = BETA1 * m + (1 - BETA1) * g, BETA2 * v_moment + (1 - BETA2) * g.square()
    d = adamw_jacobian(g, m, v_moment, 4, BETA1, BETA2, EPS) if kind == "adamw" else 1.0
    torch.testing.assert_close(-LR * grads_i @ (d * v), expected, rtol=1e-6, atol=1e-15)


def test_the_gain_is_the_part_of_the_jacobian_that_needs_no_gradient() -> None:
    """With no momentum D has its first term only; its second moment is one step older, bias-corrected alike."""
    generator = torch.Generator().manual_seed(0)
    steps, mean_square = 7, torch.rand(10, dtype=torch.float64, generator=generator)
    mean_square[3] = 0.0
    before, after = ((1 - BETA2**t) * mean_square for t in (steps, steps + 1))
    ones, none = torch.ones(10, dtype=torch.float64), torch.zeros(10, dtype=torch.float64)
    gain = adamw_gain(before, steps, BETA1, BETA2, EPS)
    torch.testing.assert_close(
        gain, adamw_jacobian(ones, none, after, steps + 1, BETA1, BETA2, EPS), rtol=1e-12, atol=0
    )
    assert gain[3] == 0
