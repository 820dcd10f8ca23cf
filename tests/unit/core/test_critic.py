"""Generalised advantages and the value loss, against their definitions written out slowly."""

import random
from dataclasses import replace

import pytest
import torch

from mifo.core.critic import ClippedValue, gae, whitened_tokens
from mifo.types import TokenStats


def slow_gae(reward, values, discount, lam):
    """The weighted mean of all k-step advantages (Schulman et al. 2016, equation 16), k-step ones by their own sums."""
    steps = len(values)
    rewards = [0.0] * (steps - 1) + [reward]

    def k_step(t, k):
        gained = sum(discount**j * rewards[t + j] for j in range(k))
        ahead = values[t + k] if t + k < steps else 0.0
        return gained + discount**k * ahead - values[t]

    found = []
    for t in range(steps):
        left = steps - t  # all longer ones equal the one that reaches the end
        mean = sum((1 - lam) * lam ** (k - 1) * k_step(t, k) for k in range(1, left))
        found.append(mean + lam ** (left - 1) * k_step(t, left))
    return found


@pytest.mark.parametrize("discount", [1.0, 0.9])
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_gae_is_the_mean_of_k_step_advantages(discount, lam, length):
    draw = random.Random(length)
    values = [draw.gauss(0, 1) for _ in range(length)]
    advantages, returns = gae(0.7, values, discount=discount, gae_lambda=lam)
    assert advantages == pytest.approx(slow_gae(0.7, values, discount, lam), rel=1e-12, abs=1e-12)
    assert returns == pytest.approx([a + v for a, v in zip(advantages, values, strict=True)])


def test_gae_by_hand():
    """δ = (½·0.6 − 0.2, ½·0.8 − 0.6, 1 − 0.8) = (0.1, −0.2, 0.2); γλ = ¼."""
    advantages, returns = gae(1.0, [0.2, 0.6, 0.8], discount=0.5, gae_lambda=0.5)
    assert advantages == pytest.approx([0.1 + 0.25 * -0.15, -0.2 + 0.25 * 0.2, 0.2])
    assert returns == pytest.approx([0.2625, 0.45, 1.0])


def test_nothing_is_bootstrapped_behind_the_last_token():
    """The tempting form takes the last value as the value of what follows a response that was cut off."""
    [first, last], _ = gae(0.0, [0.3, 0.8], discount=1.0, gae_lambda=1.0)
    assert last == pytest.approx(-0.8)
    assert last != pytest.approx(0.0)
    assert first == pytest.approx(-0.3)


def test_open_reasoner_zero_s_estimate_is_the_reward_less_the_value():
    values = [0.1, -2.0, 0.7]
    advantages, returns = gae(1.0, values, discount=1.0, gae_lambda=1.0)
    assert returns == pytest.approx([1.0] * 3)
    assert advantages == pytest.approx([1.0 - v for v in values])


def test_whitening_is_over_all_tokens_of_the_step():
    rows = [(1.0, 2.0, 3.0), (4.0,)]
    found = torch.tensor([v for row in whitened_tokens(rows) for v in row], dtype=torch.float64)
    tokens = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(found, (tokens - tokens.mean()) / (tokens.var() + 1e-8).sqrt(), rtol=1e-9, atol=1e-12)
    by_response = [(1.0 - 2.0), 0.0, 1.0, 0.0]  # each response by itself: another method
    assert found.tolist() != pytest.approx(by_response, abs=0.1)
    assert whitened_tokens([]) == []
    assert whitened_tokens([(0.0, 0.0), (0.0,)]) == [(0.0, 0.0), (0.0,)]


def stats(value, old, target, weight=1.0):
    def row(x):
        return torch.tensor(x, dtype=torch.float64)

    return TokenStats(
        logp_T=row(value).requires_grad_(),
        entropy_T=torch.zeros(len(value), dtype=torch.float64),
        weight_T=torch.full((len(value),), weight, dtype=torch.float64),
        sequence_T=torch.zeros(len(value), dtype=torch.int64),
        old_logp_T=row(old),
        target_T=row(target),
    )


def test_value_loss_by_hand():
    """Inside the range; beyond it towards the return (the clipped error is greater); beyond it away (the plain one is)."""
    seen = stats([0.3, 0.9, -0.9], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], weight=2.0)
    loss = ClippedValue(0.5)(seen)
    assert loss.tolist() == pytest.approx([2 * 0.5 * 0.49, 2 * 0.5 * 0.25, 2 * 0.5 * 1.9**2])
    loss.sum().backward()
    assert seen.logp_T.grad.tolist() == pytest.approx([2 * -0.7, 0.0, 2 * -1.9])


def test_value_loss_against_its_formula_by_autograd():
    draw = torch.Generator().manual_seed(0)
    value, old, target = (torch.randn(200, generator=draw, dtype=torch.float64) for _ in range(3))
    seen = stats(value.tolist(), old.tolist(), target.tolist())
    ClippedValue(0.3)(seen).sum().backward()
    plain = value.clone().requires_grad_()
    total = 0.0
    for t in range(200):
        near = min(max(plain[t], old[t] - 0.3), old[t] + 0.3)
        total = total + 0.5 * max((plain[t] - target[t]) ** 2, (near - target[t]) ** 2)
    total.backward()
    torch.testing.assert_close(seen.logp_T.grad, plain.grad, rtol=1e-12, atol=1e-14)
    silent = (seen.logp_T.grad == 0).sum()
    assert 20 < silent < 180


def test_without_a_clip_it_is_half_the_square():
    seen = replace(stats([0.9], [0.0], [1.0]), old_logp_T=None)
    assert ClippedValue(None)(seen).item() == pytest.approx(0.5 * 0.01)
