"""The upper level alone: what it learns, and that its state is all there is."""

from __future__ import annotations

import pytest
import torch
from synthetic import VOCAB, markov_rows

from ray_dwm.config import BilevelConfig, DwmConfig
from ray_dwm.core.weighting import weights_from_scores
from ray_dwm.engine.learner import DwmLearner, Feedback
from ray_dwm.errors import TrainingError
from ray_dwm.models.dwm import dwm_shape

B, T = 16, 12


def learner(kl: float = 0.1, updates: int = 1, lm_features: bool = False, seed: int = 0) -> DwmLearner:
    shape = dwm_shape("xs", VOCAB, lm_features)
    return DwmLearner(shape, DwmConfig(lr=3e-3), BilevelConfig(kl=kl, updates=updates), seed)


def feedback(version: int, scale: float = 1.0) -> Feedback:
    """Half of the batch is over the upper half of the vocabulary, and lowers the target loss."""
    ids = torch.from_numpy(markov_rows(B, T, 0, seed=version))
    ids[: B // 2] += 32
    alignments = torch.randn(B, generator=torch.Generator().manual_seed(version)) * 0.3
    alignments[: B // 2] -= 1.0
    return Feedback(version, ids, scale * alignments, torch.arange(B), None)


def weight_of_good(model: torch.nn.Module) -> float:
    ids = feedback(999).input_ids
    return float(weights_from_scores(model(ids).detach())[: B // 2].sum())


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e6])
def test_learns_to_favour_what_lowers_the_target_loss_in_any_unit(scale: float) -> None:
    subject = learner()
    assert weight_of_good(subject.model) == pytest.approx(0.5)
    for version in range(1, 31):
        subject.update(feedback(version, scale))
    assert weight_of_good(subject.model) > 0.9


def test_a_strong_pull_keeps_the_weights_uniform() -> None:
    subject = learner(kl=1e4)
    for version in range(1, 31):
        subject.update(feedback(version))
    assert weight_of_good(subject.model) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("updates", [1, 3])
def test_state_is_all_there_is(updates: int) -> None:
    """An update is a pure function of state and feedback: a fresh learner redoes it bit for bit."""
    first, second = learner(updates=updates), learner(updates=updates, seed=9)
    for version in (1, 2):
        first.update(feedback(version))
    second.load_state(first.state())
    left, right = first.update(feedback(3)), second.update(feedback(3))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_rolling_back_to_the_start_forgets_the_optimizer() -> None:
    subject = learner()
    start = subject.state()
    first = subject.update(feedback(1))
    subject.update(feedback(2))
    subject.load_state(start)
    again = subject.update(feedback(1))
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_published_states_do_not_change_afterwards() -> None:
    subject = learner()
    state = subject.update(feedback(1))
    copy = {key: value.clone() for key, value in state.items()}
    subject.update(feedback(2))
    assert all(torch.equal(state[key], copy[key]) for key in state)


def test_a_hypergradient_that_is_not_finite_does_not_move_the_dwm() -> None:
    subject = learner()
    before = subject.update(feedback(1))
    bad = feedback(2)
    bad.alignments[3] = float("nan")
    with pytest.raises(TrainingError, match="DWM version 2 is not finite"):
        subject.update(bad)
    assert all(torch.equal(p, before[f"phi.{name}"]) for name, p in subject.model.named_parameters())
