"""Per-token losses by hand, their identities, and their gradients by autograd."""

import math

import pytest
import torch

from mifo.core.losses import (
    CrossEntropy,
    EntropyBonus,
    KlToReference,
    PolicyGradient,
    importance_ratio,
    truncated_importance,
)
from mifo.types import TokenStats


def stats(logp, weight, old=None, ref=None, entropy=None, sampler=None):
    logp = torch.tensor(logp, dtype=torch.float64, requires_grad=True)
    return TokenStats(
        logp_T=logp,
        entropy_T=torch.tensor(entropy if entropy is not None else [0.0] * len(logp), dtype=torch.float64),
        weight_T=torch.tensor(weight, dtype=torch.float64),
        sequence_T=torch.zeros(len(logp), dtype=torch.long),
        old_logp_T=None if old is None else torch.tensor(old, dtype=torch.float64),
        ref_logp_T=None if ref is None else torch.tensor(ref, dtype=torch.float64),
        sampler_logp_T=None if sampler is None else torch.tensor(sampler, dtype=torch.float64),
    )


def test_ratio_without_old_policy_is_one_with_the_gradient_of_logp():
    s = stats([-1.0, -2.0], [1.0, 1.0])
    ratio = importance_ratio(s)
    assert ratio.tolist() == [1.0, 1.0]
    ratio.sum().backward()
    assert s.logp_T.grad.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("ratio", "advantage", "value", "gradient_flows"),
    [
        (1.1, 1.0, -1.1, True),
        (1.5, 1.0, -1.2, False),  # clipped above
        (0.5, 1.0, -0.5, True),  # the pessimistic side is not clipped
        (0.5, -1.0, 0.8, False),  # clipped below
        (1.5, -1.0, 1.5, True),
    ],
)
def test_clipping_by_hand(ratio, advantage, value, gradient_flows):
    s = stats([math.log(ratio) - 1.0], [advantage], old=[-1.0])
    loss = PolicyGradient(0.2, 0.2)(s)
    assert float(loss.detach()) == pytest.approx(value)
    loss.sum().backward()
    assert (float(s.logp_T.grad) != 0.0) == gradient_flows
    assert bool(PolicyGradient(0.2, 0.2).clipped(s)) == (not gradient_flows)


def test_clip_higher_and_no_clip_differ():
    s = stats([math.log(1.25)], [1.0], old=[0.0])
    assert float(PolicyGradient(0.2, 0.28)(s).detach()) == pytest.approx(-1.25)
    assert float(PolicyGradient(0.2, 0.2)(s).detach()) == pytest.approx(-1.2)
    assert float(PolicyGradient(None, None)(stats([math.log(9.0)], [1.0], old=[0.0])).detach()) == pytest.approx(-9.0)


def test_dual_clip_bounds_bad_tokens_only():
    s = stats([math.log(10.0), math.log(10.0)], [-1.0, 1.0], old=[0.0, 0.0])
    assert PolicyGradient(0.2, 0.2, dual_clip=3.0)(s).tolist() == pytest.approx([3.0, -1.2])
    assert PolicyGradient(0.2, 0.2)(s).tolist() == pytest.approx([10.0, -1.2])


def test_first_update_gradient_is_minus_advantage():
    s = stats([-0.3, -4.0], [0.5, -2.0])
    PolicyGradient()(s).sum().backward()
    assert s.logp_T.grad.tolist() == pytest.approx([-0.5, 2.0])


def test_cross_entropy_and_entropy_bonus():
    s = stats([-0.5, -2.0], [1.0, 0.5], entropy=[1.5, 0.25])
    assert CrossEntropy()(s).tolist() == [0.5, 1.0]
    assert EntropyBonus()(s).tolist() == [-1.5, -0.125]


def test_k3_is_zero_at_the_reference_and_positive_elsewhere():
    s = stats([-1.0, -2.0, -0.5], [1.0, 1.0, 1.0], ref=[-1.0, -1.0, -1.5])
    values = KlToReference()(s)
    expected = [0.0, math.e - 2.0, math.exp(-1.0)]  # d = 0, 1, −1
    assert values.tolist() == pytest.approx(expected, abs=1e-12)
    assert float(values[1].detach()) != pytest.approx(1.0)  # the plain difference |d| is the tempting estimate


def test_k3_is_an_unbiased_estimate_of_kl():
    generator = torch.Generator().manual_seed(0)
    policy, reference = (
        torch.log_softmax(torch.randn(6, generator=generator, dtype=torch.float64), -1) for _ in range(2)
    )
    exact = float((policy.exp() * (policy - reference)).sum())
    values = KlToReference()(stats(policy.tolist(), [1.0] * 6, ref=reference.tolist()))
    assert float((policy.exp() * values).sum().detach()) == pytest.approx(exact, rel=1e-12)


def test_dft_weight_identity():
    """The gradient of −sg(p)·log p equals that of −p."""
    logits = torch.randn(5, 11, dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 11, (5,))
    logp = torch.log_softmax(logits, -1).gather(1, target[:, None])[:, 0]
    weighted = TokenStats(
        logp_T=logp, entropy_T=logp.detach(), weight_T=logp.detach().exp(), sequence_T=torch.zeros(5, dtype=torch.long)
    )
    [gradient] = torch.autograd.grad(CrossEntropy()(weighted).mean(), logits, retain_graph=True)
    [expected] = torch.autograd.grad(-logp.exp().mean(), logits, retain_graph=True)
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)
    [plain] = torch.autograd.grad(-logp.mean(), logits)
    assert not torch.allclose(plain, expected)


def test_luffy_shaping_identity():
    """−A·f(p), f = p/(p+γ), has the gradient −A·γp/(p+γ)²·∇log p."""
    logp = torch.tensor([-0.1, -1.0, -3.0], dtype=torch.float64, requires_grad=True)
    advantage, gamma = 0.75, 0.1
    p = logp.exp()
    [gradient] = torch.autograd.grad((-advantage * p / (p + gamma)).sum(), logp)
    weight = (advantage * gamma * p / (p + gamma) ** 2).detach()
    s = TokenStats(logp_T=logp, entropy_T=logp.detach(), weight_T=weight, sequence_T=torch.zeros(3, dtype=torch.long))
    [mine] = torch.autograd.grad(CrossEntropy()(s).sum(), logp)
    torch.testing.assert_close(mine, gradient, rtol=1e-12, atol=1e-14)


def test_psft_first_mini_batch_is_sft():
    """ψ with A ≡ 1 and π_old = π_θ has SFT's gradient; after a move beyond ε it has none."""
    s = stats([-0.5, -2.0], [1.0, 1.0])
    PolicyGradient(0.2, 0.28)(s).sum().backward()
    assert s.logp_T.grad.tolist() == [-1.0, -1.0]
    moved = stats([-0.5, -2.0], [1.0, 1.0], old=[-1.5, -2.0])
    PolicyGradient(0.2, 0.28)(moved).sum().backward()
    assert moved.logp_T.grad.tolist() == [0.0, -1.0]


def slow_truncated_objective(logp, old, sampler, advantage, low, high, cap):
    """Token by token, as printed: −min(π_old/π_sampler, C) · min(rA, clip(r, 1−ε_l, 1+ε_h) A)."""
    values = []
    for new, before, drawn, a in zip(logp, old, sampler, advantage, strict=True):
        r = math.exp(new) / math.exp(before)
        clipped = min(max(r, 1 - low), 1 + high)
        values.append(-min(math.exp(before) / math.exp(drawn), cap) * min(r * a, clipped * a))
    return values


def test_truncated_importance_equals_the_slow_version_and_has_no_gradient_of_its_own():
    draw = torch.Generator().manual_seed(0)
    logp, old, sampler = (-3 * torch.rand(50, generator=draw, dtype=torch.float64) for _ in range(3))
    advantage = torch.randn(50, generator=draw, dtype=torch.float64)
    s = stats(logp.tolist(), advantage.tolist(), old=old.tolist(), sampler=sampler.tolist())
    loss = PolicyGradient(0.2, 0.3, None, 2.0)
    expected = slow_truncated_objective(*(t.tolist() for t in (logp, old, sampler, advantage)), 0.2, 0.3, 2.0)
    assert loss(s).tolist() == pytest.approx(expected, rel=1e-12)
    weights = truncated_importance(s, 2.0)
    assert not weights.requires_grad
    assert 0 < int((weights == 2.0).sum()) < 50  # the cap acts on some and not on others
    loss(s).sum().backward()
    plain = stats(logp.tolist(), advantage.tolist(), old=old.tolist())
    PolicyGradient(0.2, 0.3)(plain).sum().backward()
    torch.testing.assert_close(s.logp_T.grad, weights * plain.logp_T.grad, rtol=1e-12, atol=0.0)


def test_importance_of_on_policy_tokens_is_that_of_the_current_policy():
    """Without π_old the current policy stands in for it, detached: the weight is a constant."""
    s = stats([-1.0, -2.0], [1.0, 1.0], sampler=[-1.5, -4.0])
    assert truncated_importance(s, 10.0).tolist() == pytest.approx([math.exp(0.5), math.exp(2.0)])
    assert truncated_importance(s, 2.0).tolist() == pytest.approx([math.exp(0.5), 2.0])
    PolicyGradient(importance_cap=2.0)(s).sum().backward()
    assert s.logp_T.grad.tolist() == pytest.approx([-math.exp(0.5), -2.0])


def test_importance_makes_the_sampler_s_gradient_that_of_the_trainer():
    """In expectation over the sampler's draws; without the weights it is another gradient."""
    draw = torch.Generator().manual_seed(1)
    trainer, sampler = (torch.randn(6, generator=draw, dtype=torch.float64).log_softmax(0) for _ in range(2))
    advantage = torch.randn(6, generator=draw, dtype=torch.float64)

    def expected_gradient(probabilities, cap):
        s = stats(trainer.tolist(), advantage.tolist(), sampler=sampler.tolist())
        loss = PolicyGradient(None, None, None, cap)
        (probabilities * loss(s)).sum().backward()
        return s.logp_T.grad

    wanted = expected_gradient(trainer.exp(), None)
    torch.testing.assert_close(expected_gradient(sampler.exp(), 1e9), wanted, rtol=1e-12, atol=0.0)
    assert float((expected_gradient(sampler.exp(), None) - wanted).norm()) > 0.1 * float(wanted.norm())
