"""GSPO's ratio of a response and CISPO's clipped weight, against slow versions and their identities."""

import math
from dataclasses import replace

import pytest
import torch

from mifo.core.losses import PolicyGradient, sequence_ratio
from mifo.core.reduce import sequence_scale, update_totals, weighted_sum
from mifo.types import TokenStats

LENGTHS = [3, 5, 1]
ADVANTAGES = [0.75, -0.5, 1.25]
GSPO = PolicyGradient(0.1, 0.2, ratio="sequence")
CISPO = PolicyGradient(None, 0.2, clip="weight")


def random_stats(spread=0.3, seed=0):
    draw = torch.Generator().manual_seed(seed)
    sequence = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))
    old = -2 * torch.rand(9, generator=draw, dtype=torch.float64)
    moved = old + spread * torch.randn(9, generator=draw, dtype=torch.float64)
    return TokenStats(
        logp_T=moved.requires_grad_(),
        entropy_T=torch.zeros(9, dtype=torch.float64),
        weight_T=torch.tensor(ADVANTAGES, dtype=torch.float64)[sequence],
        sequence_T=sequence,
        old_logp_T=old,
    )


def by_sequence(stats):
    start = 0
    for n, advantage in zip(LENGTHS, ADVANTAGES, strict=True):
        rows = slice(start, start + n)
        yield stats.logp_T[rows], stats.old_logp_T[rows], advantage
        start += n


def test_ratio_of_a_response_is_the_geometric_mean():
    stats = random_stats()
    ratios = sequence_ratio(stats)
    expected = [math.prod((new - old).exp().tolist()) ** (1 / len(old)) for new, old, _ in by_sequence(stats)]
    assert ratios.tolist() == pytest.approx([r for r, n in zip(expected, LENGTHS, strict=True) for _ in range(n)])
    assert sequence_ratio(replace(stats, old_logp_T=None)).tolist() == [1.0] * 9


def test_the_ratio_of_a_response_is_bounded_as_verl_bounds_it():
    """log s is at most 10: a response 12 nats a token likelier than before has no gradient; the others are as they were."""
    plain = random_stats()
    moved = plain.old_logp_T.clone()
    moved[:3] += 12.0
    stats = replace(plain, logp_T=torch.where(plain.sequence_T == 0, moved, plain.logp_T.detach()).requires_grad_())
    ratios = sequence_ratio(stats)
    assert ratios[:3].tolist() == pytest.approx([math.exp(10.0)] * 3)
    assert ratios[3:].tolist() == sequence_ratio(plain)[3:].tolist()
    (slope,) = torch.autograd.grad(ratios.sum(), stats.logp_T)
    assert slope[:3].tolist() == [0.0] * 3
    assert (slope[3:] > 0).all()


def sequence_mean(stats, values):
    totals = update_totals([LENGTHS])[0]
    scale = torch.tensor([sequence_scale(n, totals, "sequence") for n in LENGTHS], dtype=torch.float64)
    return weighted_sum(values, scale[stats.sequence_T])


@pytest.mark.parametrize("spread", [0.05, 0.3, 1.0])
def test_gspo_summed_by_sequence_has_the_gradient_of_the_sequence_objective(spread):
    """(1/|U|) Σ_i −min(s_i A, clip(s_i) A), s_i differentiable: what the paper prints."""
    stats = random_stats(spread)
    mine = sequence_mean(stats, GSPO(stats))
    rows = []
    for new, old, advantage in by_sequence(stats):
        s = ((new - old).sum() / len(old)).exp()
        rows.append(-torch.minimum(s * advantage, s.clamp(0.9, 1.2) * advantage))
    theirs = sum(rows) / len(rows)
    assert float(mine.detach()) == pytest.approx(float(theirs.detach()), rel=1e-12)
    [a], [b] = torch.autograd.grad(mine, stats.logp_T), torch.autograd.grad(theirs, stats.logp_T)
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)


def test_gspo_clips_whole_responses():
    stats = random_stats(1.0, seed=2)
    silent = GSPO.clipped(stats)
    assert 0 < int(silent.sum()) < 9
    for rows in silent.split(LENGTHS):
        assert len(set(rows.tolist())) == 1
    GSPO(stats).sum().backward()
    assert (stats.logp_T.grad == 0).tolist() == silent.tolist()


def test_cispo_token_by_token():
    """−sg(clip(r, 0, 1.2)) A log π: value and gradient."""
    stats = random_stats(0.5)
    weights = [
        min(math.exp(new - old), 1.2) for new, old in zip(stats.logp_T.tolist(), stats.old_logp_T.tolist(), strict=True)
    ]
    expected = [-w * a * p for w, a, p in zip(weights, stats.weight_T.tolist(), stats.logp_T.tolist(), strict=True)]
    values = CISPO(stats)
    assert values.tolist() == pytest.approx(expected, rel=1e-12)
    values.sum().backward()
    slopes = [-w * a for w, a in zip(weights, stats.weight_T.tolist(), strict=True)]
    assert stats.logp_T.grad.tolist() == pytest.approx(slopes, rel=1e-12)
    assert CISPO.clipped(stats).tolist() == [w == 1.2 for w in weights]
    assert 0 < int(CISPO.clipped(stats).sum()) < 9


@pytest.mark.parametrize("variant", [GSPO, CISPO])
def test_on_policy_both_are_the_plain_policy_gradient(variant):
    stats = replace(random_stats(), old_logp_T=None)
    [mine], [plain] = (torch.autograd.grad(f(stats).sum(), stats.logp_T) for f in (variant, PolicyGradient(None, None)))
    torch.testing.assert_close(mine, plain, rtol=1e-12, atol=0.0)


def test_off_policy_they_differ_from_ppo_s_clip():
    stats = random_stats(0.5)
    gradients = [torch.autograd.grad(f(stats).sum(), stats.logp_T)[0] for f in (GSPO, CISPO, PolicyGradient(0.1, 0.2))]
    for i, a in enumerate(gradients):
        assert all(float((a - b).norm()) > 0.1 for b in gradients[i + 1 :])
