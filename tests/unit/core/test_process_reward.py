"""PRIME's advantages by hand and against a slow version, and the loss of its reward model by autograd."""

import random
import statistics

import pytest
import torch

from mifo.core.process_reward import (
    OutcomeCrossEntropy,
    centred_dense,
    over_greatest_sum,
    prime_advantages,
    reverse_sums,
)
from mifo.core.reduce import sequence_scale, update_totals, weighted_sum
from mifo.types import TokenStats

PLAIN = {"dense_coefficient": 1.0, "baseline": "leave_one_out", "normalise": False, "discount": 1.0, "whiten": False}


def test_reverse_sums_by_hand():
    assert reverse_sums([1.0, 2.0, 4.0], 1.0) == [7.0, 6.0, 4.0]
    assert reverse_sums([1.0, 2.0, 4.0], 0.5) == [1.0 + 1.0 + 1.0, 4.0, 4.0]
    assert reverse_sums([], 1.0) == []


def test_advantages_by_hand():
    """Two responses, q = (1, 3) and (5): the other's token mean is taken from each token, and the sums run to the end.

    (1 − 5, 3 − 5) sums to (−6, −2), (5 − 2) to (3); the outcomes 1 and 0 add 1 and −1 at every token.
    """
    found = prime_advantages([[1.0, 0.0]], [[(1.0, 3.0), (5.0,)]], **PLAIN)
    assert found == [[(-5.0, -1.0), (2.0,)]]


def test_the_scaled_baseline_by_hand():
    """N/(N − 1) q − Σ means/(N − 1) = 2q − 7: another number as soon as a response has several tokens."""
    assert centred_dense([(1.0, 3.0), (5.0,)], "scaled") == [[-5.0, -1.0], [3.0]]
    assert centred_dense([(1.0, 3.0), (5.0,)], "leave_one_out") == [[-4.0, -2.0], [3.0]]
    one_each = [(1.0,), (5.0,), (0.5,)]
    for scaled, plain in zip(centred_dense(one_each, "scaled"), centred_dense(one_each, "leave_one_out"), strict=True):
        assert scaled == pytest.approx(plain)


def slow_advantages(rewards, dense, *, coefficient, discount, scaled):
    """Every definition written out, token by token; lists of a step, in order."""
    greatest = max(abs(sum(row[t:])) for group in dense for row in group for t in range(len(row)))
    flat = []
    for group, outcome in zip(dense, rewards, strict=True):
        n = len(group)
        q = [[value / (greatest + 1e-6) for value in row] for row in group]
        for i, row in enumerate(q):
            others = [statistics.mean(q[j]) for j in range(n) if j != i]
            every = [statistics.mean(r) for r in q]
            for t in range(len(row)):
                process = sum(
                    discount ** (k - t)
                    * (row[k] * n / (n - 1) - sum(every) / (n - 1) if scaled else row[k] - statistics.mean(others))
                    for k in range(t, len(row))
                )
                rloo = outcome[i] - statistics.mean(outcome[j] for j in range(n) if j != i)
                flat.append(discount ** (len(row) - 1 - t) * rloo + coefficient * process)
    mean, deviation = statistics.mean(flat), (statistics.variance(flat) + 1e-8) ** 0.5
    return [(value - mean) / deviation for value in flat]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_advantages_equal_the_slow_version(scaled, discount):
    draw = random.Random(3)
    dense = [[tuple(draw.gauss(0, 2) for _ in range(draw.randrange(1, 9))) for _ in range(4)] for _ in range(3)]
    rewards = [[float(draw.random() < 0.5) for _ in range(4)] for _ in range(3)]
    found = prime_advantages(
        rewards,
        dense,
        dense_coefficient=5.0,
        baseline="scaled" if scaled else "leave_one_out",
        normalise=True,
        discount=discount,
        whiten=True,
    )
    assert [[len(row) for row in group] for group in found] == [[len(row) for row in group] for group in dense]
    flat = [value for group in found for row in group for value in row]
    assert flat == pytest.approx(slow_advantages(rewards, dense, coefficient=5.0, discount=discount, scaled=scaled))


def test_the_scale_of_process_rewards_does_not_reach_the_policy_once_normalised():
    dense = [[(0.5, -1.0), (2.0, 0.25)]]
    ten_times = [[tuple(10 * q for q in row) for row in group] for group in dense]
    settings = {**PLAIN, "normalise": True}
    first, second = (prime_advantages([[1.0, 0.0]], q, **settings) for q in (dense, ten_times))
    for row, other in zip(first[0], second[0], strict=True):
        assert row == pytest.approx(other, rel=1e-5)
    plain, tenfold = (prime_advantages([[1.0, 0.0]], q, **PLAIN) for q in (dense, ten_times))
    assert plain[0][0] != pytest.approx(tenfold[0][0], rel=0.1)


def test_the_norm_is_the_greatest_sum_and_not_the_greatest_reward():
    [[row]] = over_greatest_sum([[(1.0, 1.0, 1.0, -1.0)]])
    assert row == pytest.approx([0.5, 0.5, 0.5, -0.5], rel=1e-5)  # sums (2, 1, 0, −1)
    assert over_greatest_sum([]) == []
    assert over_greatest_sum([[(0.0, 0.0)]]) == [[[0.0, 0.0]]]


LENGTHS = [3, 1, 5]
LABELS = [1.0, 0.0, 1.0]


def test_the_reward_model_s_loss_is_the_mean_of_each_response_s_cross_entropy():
    """Through the reducer, by autograd: (1/3) Σ_i BCE(σ(β Σ_t q), label)."""
    draw = torch.Generator().manual_seed(1)
    logp = -2 * torch.rand(9, generator=draw, dtype=torch.float64)
    reference = -2 * torch.rand(9, generator=draw, dtype=torch.float64)
    sequence = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))
    seen = TokenStats(
        logp_T=logp.clone().requires_grad_(),
        entropy_T=torch.zeros_like(logp),
        weight_T=torch.ones_like(logp),
        sequence_T=sequence,
        ref_logp_T=reference,
        target_T=torch.tensor(LABELS, dtype=torch.float64)[sequence],
    )
    [totals] = update_totals([LENGTHS])
    scale = torch.tensor([sequence_scale(n, totals, "sequence") for n in LENGTHS], dtype=torch.float64)[sequence]
    loss = weighted_sum(OutcomeCrossEntropy(0.7)(seen), scale)
    loss.backward()

    own = logp.clone().requires_grad_()
    expected = 0.0
    for i, label in enumerate(LABELS):
        share = torch.sigmoid(0.7 * (own - reference)[sequence == i].sum())
        expected = expected - (label * share.log() + (1 - label) * (1 - share).log()) / 3
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(seen.logp_T.grad, own.grad, rtol=1e-10, atol=1e-14)
