"""Group DRO by hand: excess, the exponentiated gradient, the average, and what the sequence weights estimate."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from ray_dwm.core.group_dro import domain_sums, excess_sums, presence, sequence_weights, start, update


def close(actual: Tensor, expected: list[float], atol: float = 1e-12) -> None:
    torch.testing.assert_close(actual.double(), torch.tensor(expected, dtype=torch.float64), rtol=0.0, atol=atol)


def sums(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_excess_is_clipped_token_by_token() -> None:
    losses = torch.tensor([[3.0, 1.0, 2.0], [1.0, 1.0, 5.0]])
    reference = torch.tensor([[1.0, 2.0, 2.0], [0.5, 3.0, 1.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    close(excess_sums(losses, reference, mask), [2.0, 0.5])  # not 1.0 and -1.5: what is below the reference is 0
    close(excess_sums(losses, None, mask), [6.0, 2.0])
    close(excess_sums(losses, losses, mask), [0.0, 0.0])


def test_domain_sums() -> None:
    close(domain_sums(sums(1, 2, 4, 8), torch.tensor([2, 0, 2, 0]), 4), [10, 0, 5, 0])


# alpha exp(eta lambda) with lambda = log 2 and log 4 per token, from 1/2 each.
@pytest.mark.parametrize(
    ("eta", "smoothing", "expected"),
    [
        (1.0, 0.0, [1 / 3, 2 / 3]),  # 2 : 4
        (2.0, 0.0, [1 / 5, 4 / 5]),  # 4 : 16
        (0.0, 0.0, [1 / 2, 1 / 2]),
        (1.0, 0.25, [3 / 4 / 3 + 1 / 8, 3 / 4 * 2 / 3 + 1 / 8]),
        (1.0, 1.0, [1 / 2, 1 / 2]),
    ],
)
def test_a_step_by_hand(eta: float, smoothing: float, expected: list[float]) -> None:
    state = update(start(sums(7, 7)), sums(3 * math.log(2), 5 * math.log(4)), sums(3, 5), eta=eta, smoothing=smoothing)
    close(state.alpha_D, expected)
    close(state.average_D, expected)
    close(state.excess_D, [math.log(2), math.log(4)])


def test_the_average_is_over_the_weights_after_each_step() -> None:
    state, seen = start(sums(1, 2, 1)), []
    close(state.alpha_D, [0.25, 0.5, 0.25])
    for step in range(5):
        state = update(state, sums(step, 1, 3), sums(1, 1, 2), eta=0.3, smoothing=0.01)
        seen.append(state.alpha_D)
    torch.testing.assert_close(state.average_D, torch.stack(seen).mean(0), rtol=0, atol=1e-14)
    assert state.updates == 5 and float(state.alpha_D.sum()) == pytest.approx(1)


def test_absent_domains_keep_their_last_excess_and_unseen_ones_their_weight() -> None:
    first = update(start(sums(1, 1, 1)), sums(0.0, 2 * math.log(3), 0.0), sums(4, 2, 0), eta=1.0, smoothing=0.0)
    # The third was not seen: it is taken to have the mean of 0 and log 3, so 1 : 3 : sqrt 3.
    total = 4 + math.sqrt(3)
    close(first.alpha_D, [1 / total, 3 / total, math.sqrt(3) / total])
    assert first.excess_D[2].isnan()
    second = update(first, sums(math.log(2), 0.0, 0.0), sums(1, 0, 1), eta=1.0, smoothing=0.0)
    total = 2 + 9 + math.sqrt(3)  # the second again times 3, though it is absent; the third now has an excess of 0
    close(second.alpha_D, [2 / total, 9 / total, math.sqrt(3) / total])
    close(second.excess_D, [math.log(2), math.log(3), 0.0])


def test_large_excess_does_not_overflow_and_smoothing_is_a_floor() -> None:
    state = start(sums(1, 1, 1, 1))
    for _ in range(50):
        state = update(state, sums(1e4, 0, 0, 0), sums(1, 1, 1, 1), eta=1.0, smoothing=1e-3)
    close(state.alpha_D, [1 - 3 * 2.5e-4, 2.5e-4, 2.5e-4, 2.5e-4])


def test_a_collapse_is_counted_while_it_lasts() -> None:
    state, counts = start(sums(1, 1)), []
    for excess in ((1, 0), (9, 0), (0, 0), (0, 20), (0, 1), (4, 0)):
        state = update(state, sums(*excess), sums(1, 1), eta=1.0, smoothing=0.0, min_entropy=0.05)
        counts.append(state.collapsed)
    # Log odds 1, 10, 10, -10, -11, -7: nearly all is on the first, then on the second.
    assert counts == [0, 1, 2, 1, 2, 3]
    assert update(state, sums(7, 0), sums(1, 1), eta=1.0, smoothing=0.0, min_entropy=0.05).collapsed == 0


def test_presence() -> None:
    close(presence(sums(0.5, 0.25, 1.0), 3), [7 / 8, 1 - 27 / 64, 1.0])
    close(presence(sums(1e-12), 64), [64e-12], atol=1e-19)


def test_weights_by_hand() -> None:
    """Domain 0 has 2 + 6 tokens in two sequences, domain 1 4 in one, 2 is absent, nothing of 3 counts."""
    alpha, present = sums(0.1, 0.3, 0.4, 0.2), sums(1.0, 0.5, 0.1, 1.0)
    weights = sequence_weights(alpha, present, sums(2, 4, 6, 0), torch.tensor([0, 1, 0, 3]))
    per_token = [0.1 / 8, 0.3 / 0.5 / 4]
    relative = [per_token[0], per_token[1], per_token[0], 0.0]
    close(weights, [w / sum(relative) for w in relative])


def test_pool_shares_give_uniform_weights_where_all_sequences_count_the_same() -> None:
    codes = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1])
    close(sequence_weights(sums(3, 5) / 8, sums(1, 1), torch.full((8,), 15), codes), [1 / 8] * 8)


def test_over_batches_the_loss_is_that_of_the_minimax_objective() -> None:
    """Its mean over batches is sum_d alpha_d loss_d, though a rare domain is often absent."""
    generator = torch.Generator().manual_seed(0)
    shares, alpha = sums(0.9, 0.09, 0.01), sums(0.5, 0.3, 0.2)
    losses = sums(1.0, 2.0, 5.0)
    batch, found, rough, absent = 32, 0.0, 0.0, 0
    draws = torch.multinomial(shares, 4000 * batch, replacement=True, generator=generator).view(-1, batch)
    present = presence(shares, batch)
    for codes in draws:
        # Before normalisation it is exact in expectation; the factor undoes the normalisation.
        counts = torch.bincount(codes, minlength=3)
        total = float((alpha / present)[counts > 0].sum())
        weights = sequence_weights(alpha, present, torch.ones(batch), codes)
        found += total * float(weights @ losses[codes]) / len(draws)
        rough += float(alpha[counts > 0] @ losses[counts > 0]) / len(draws)
        absent += int(counts[2] == 0)
    assert absent > 2000
    assert found == pytest.approx(float(alpha @ losses), rel=0.03)
    assert rough < 0.8 * float(alpha @ losses)  # without 1 / p_d the rare domain would lose most of its weight


def test_normalisation_takes_from_a_rare_domain() -> None:
    """Of alpha = 0.4 in a quarter of the batches 0.4 / (1 + 0.4 * 3) is left, whatever the batch holds of each."""
    alpha, present = sums(0.6, 0.4), sums(1.0, 0.25)
    without = sequence_weights(alpha, present, torch.ones(4), torch.tensor([0, 0, 0, 0]))
    beside = sequence_weights(alpha, present, torch.ones(4), torch.tensor([0, 0, 1, 0]))
    close(without, [1 / 4] * 4)
    assert 0.25 * float(beside[2]) == pytest.approx(0.4 / 2.2)
