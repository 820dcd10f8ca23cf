"""Losses of demonstrations beside rollouts, against formulas differentiated by autograd in fp64, and CHORD's schedule by hand."""

import math

import pytest
import torch

from mifo.core.imitation import DynamicFineTuning
from mifo.core.mixing import EntropyWeighted, OffPolicy, sequence_means, warmup_cosine
from mifo.types import TokenStats

LENGTHS, VOCABULARY = (4, 1, 7), 9


@pytest.fixture
def case():
    """(logits with gradient, targets, stats) of three sequences in fp64."""
    draw = torch.Generator().manual_seed(3)
    rows = sum(LENGTHS)
    logits = (3 * torch.randn(rows, VOCABULARY, generator=draw, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(VOCABULARY, (rows,), generator=draw)
    logp = torch.log_softmax(logits, -1)
    stats = TokenStats(
        logp_T=logp[torch.arange(rows), targets],
        entropy_T=-(logp.exp() * logp).sum(-1),
        weight_T=torch.randn(rows, generator=draw, dtype=torch.float64),
        sequence_T=torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)),
    )
    return logits, targets, stats


def gradient(value, logits):
    (grad,) = torch.autograd.grad(value.sum(), logits, retain_graph=True)
    return grad


def slow_logp_gradient(logits, targets, weights):
    """Σ w ∇ log softmax by its closed form, row by row: w (onehot − p)."""
    rows = []
    for row, target, weight in zip(logits.detach(), targets, weights, strict=True):
        p = torch.exp(row - row.max()) / torch.exp(row - row.max()).sum()
        rows.append(weight * (torch.nn.functional.one_hot(target, VOCABULARY) - p))
    return torch.stack(rows)


@pytest.mark.parametrize("gamma", [0.1, 1.0, None])
def test_off_policy_gradient_is_the_identity_of_luffy(case, gamma):
    """Loss −A f(p): gradient −A·γp/(p+γ)²·∇log p; unshaped −A·p·∇log p."""
    logits, targets, stats = case
    loss = OffPolicy(gamma)(stats)
    p = stats.logp_T.detach().exp()
    shaped = p if gamma is None else p / (p + gamma)
    assert torch.allclose(loss.detach(), -stats.weight_T * shaped, rtol=1e-12)
    factor = p if gamma is None else gamma * p / (p + gamma) ** 2
    assert torch.allclose(gradient(loss, logits), slow_logp_gradient(logits, targets, -stats.weight_T * factor))


def test_shaping_favours_unlikely_tokens():
    """The weight 0.1p/(p+0.1)² peaks at 0.25 where p = 0.1; unshaped p would favour likely tokens."""
    p = torch.tensor([0.001, 0.1, 0.9], dtype=torch.float64)
    logp = p.log().requires_grad_()
    stats = TokenStats(logp_T=logp, entropy_T=p, weight_T=torch.ones(3), sequence_T=torch.zeros(3, dtype=torch.long))
    weight = -gradient(OffPolicy(0.1)(stats), logp)
    assert weight.tolist() == pytest.approx([0.1 * q / (q + 0.1) ** 2 for q in p.tolist()])
    assert weight.argmax() == 1
    assert float(weight.max()) == pytest.approx(0.25)
    assert (-gradient(OffPolicy(None)(stats), logp)).argmax() == 2


@pytest.mark.parametrize("sign", ["minus", "plus"])
@pytest.mark.parametrize("scope", ["sequence", "token"])
def test_entropy_weights_are_constants_to_the_gradient(case, sign, scope):
    logits, targets, stats = case
    loss = EntropyWeighted(0.5, sign, scope)(stats)
    factors, start = [], 0
    for length in LENGTHS:
        entropies = stats.entropy_T[start : start + length].tolist()
        start += length
        mean = sum(entropies) / length
        factors += [
            0.5 * math.exp((1 if sign == "plus" else -1) * (mean if scope == "sequence" else h)) for h in entropies
        ]
    factor = torch.tensor(factors, dtype=torch.float64)
    assert torch.allclose(loss.detach(), -stats.weight_T * factor * stats.logp_T.detach(), rtol=1e-12)
    # a weight that were differentiated would add a term of ∇H here
    assert torch.allclose(gradient(loss, logits), slow_logp_gradient(logits, targets, -stats.weight_T * factor))


def test_entropy_weights_multiply_any_loss_of_imitation(case):
    """DFT under SRFT's weight: the factor times p times the gradient of −log p, both constants."""
    logits, targets, stats = case
    loss = EntropyWeighted(0.5, "minus", "token", DynamicFineTuning())(stats)
    factor = 0.5 * torch.exp(-stats.entropy_T.detach()) * stats.logp_T.detach().exp()
    assert torch.allclose(loss.detach(), -stats.weight_T * factor * stats.logp_T.detach(), rtol=1e-12)
    assert torch.allclose(gradient(loss, logits), slow_logp_gradient(logits, targets, -stats.weight_T * factor))


def test_sequence_means_of_sequences_out_of_order():
    values = torch.tensor([1.0, 2.0, 6.0, 5.0], dtype=torch.float64)
    assert sequence_means(values, torch.tensor([1, 0, 0, 1])).tolist() == [3.0, 4.0, 4.0, 3.0]
    assert sequence_means(values[:0], torch.tensor([], dtype=torch.long)).tolist() == []


def test_schedule_by_hand():
    def mu(step, warmup=200, decay=400, peak=0.5, valley=0.02):
        return warmup_cosine(step, warmup=warmup, decay=decay, peak=peak, valley=valley)

    assert [mu(s) for s in (0, 100, 200, 400, 600, 10_000)] == pytest.approx([0, 0.25, 0.5, 0.26, 0.02, 0.02])
    assert mu(300) == pytest.approx(0.02 + 0.48 * (2 + math.sqrt(2)) / 4)  # linear would give 0.38
    assert mu(0, warmup=0, decay=200, peak=0.9, valley=0.05) == 0.9
    assert mu(7, warmup=0, decay=0, peak=0.1, valley=0.1) == 0.1
