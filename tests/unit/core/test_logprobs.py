"""Chunked log-probs and entropies against the whole [tokens, vocabulary] tensor."""

import pytest
import torch

from mifo.core import logprobs
from mifo.core.logprobs import token_logprobs


def oracle(hidden, weight, target, bias=None):
    log_probs = torch.log_softmax(torch.nn.functional.linear(hidden, weight, bias), -1)
    return log_probs.gather(1, target[:, None])[:, 0], -(log_probs.exp() * log_probs).sum(-1)


@pytest.mark.parametrize("chunk_rows", [1, 7, 50, 64])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_equal_the_full_tensor(chunk_rows, with_bias):
    generator = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in [(50, 16), (97, 16), (97,)]
    )
    target = torch.randint(0, 97, (50,), generator=generator)
    leaves = (hidden, weight, bias) if with_bias else (hidden, weight)
    mine = token_logprobs(hidden, weight, target, bias_V=bias if with_bias else None, chunk_rows=chunk_rows)
    theirs = oracle(hidden, weight, target, bias if with_bias else None)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    weights = torch.randn(2, 50, generator=generator, dtype=torch.float64)
    weights[0, ::3] = 0.0
    weights[1, ::2] = 0.0

    def gradients(pair):
        return torch.autograd.grad((weights[0] * pair[0]).sum() + (weights[1] * pair[1]).sum(), leaves)

    for a, b in zip(gradients(mine), gradients(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_rows_without_gradient_never_meet_the_backward_pass(monkeypatch):
    hidden = torch.randn(40, 8, requires_grad=True)
    weight = torch.randn(31, 8, requires_grad=True)
    logp, _ = token_logprobs(hidden, weight, torch.randint(0, 31, (40,)))
    seen = []
    plain = logprobs.logits_of
    monkeypatch.setattr(logprobs, "logits_of", lambda h, w, b: seen.append(len(h)) or plain(h, w, b))
    mask = torch.zeros(40)
    mask[[3, 17]] = 1.0
    (logp * mask).sum().backward()
    assert sum(seen) == 2
    assert hidden.grad[[3, 17]].abs().sum() > 0
    assert hidden.grad.abs().sum(1).count_nonzero() == 2


def test_impossible_tokens_have_no_part_in_the_entropy():
    weight, hidden = torch.eye(4, dtype=torch.float64), torch.zeros(1, 4, dtype=torch.float64)
    bias = torch.tensor([0.0, 0.0, float("-inf"), float("-inf")], dtype=torch.float64)
    logp, entropy = token_logprobs(hidden, weight, torch.tensor([1]), bias_V=bias)
    assert float(logp) == pytest.approx(-0.6931471805599453)
    assert float(entropy) == pytest.approx(0.6931471805599453)


def test_no_tokens():
    weight = torch.randn(5, 3, requires_grad=True)
    logp, entropy = token_logprobs(torch.zeros(0, 3, requires_grad=True), weight, torch.zeros(0, dtype=torch.long))
    assert logp.shape == entropy.shape == (0,)


def test_bfloat16_statistics_are_made_in_fp32():
    hidden, weight = torch.randn(20, 32).bfloat16(), torch.randn(300, 32)
    logp, entropy = token_logprobs(hidden, weight, torch.arange(20))
    assert logp.dtype == entropy.dtype == torch.float32
    expected, _ = oracle(hidden.float(), weight.bfloat16().float(), torch.arange(20))
    assert float((logp - expected).abs().max()) < 0.1
