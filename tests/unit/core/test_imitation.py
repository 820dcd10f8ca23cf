"""Losses of imitation against slow versions written from the formulas, with gradients by autograd of the whole [T, V]."""

import math

import pytest
import torch

from mifo.core import vocabulary
from mifo.core.imitation import (
    EAFT_TOP,
    AnchoredFineTuning,
    ChordPhi,
    DynamicFineTuning,
    EntropyAdaptive,
    GameEntropy,
)
from mifo.core.logprobs import token_logprobs
from mifo.core.losses import CrossEntropy, PolicyGradient
from mifo.core.vocabulary import GemObjective, KlFromReference, Rows, TopLogitEntropy, vocabulary_statistic
from mifo.types import TokenStats

T, D, V = 23, 9, 41


class Bench:
    """A random head in fp64, its reference, targets and sequence weights."""

    def __init__(self, seed=0, bias=True):
        draw = torch.Generator().manual_seed(seed)

        def make(*shape):
            return torch.randn(*shape, generator=draw, dtype=torch.float64).requires_grad_()

        self.hidden, self.weight, self.bias = make(T, D), make(V, D), make(V) if bias else None
        self.reference = Rows(make(T, D).detach(), make(V, D).detach())
        self.target = torch.randint(0, V, (T,), generator=draw)
        self.scale = torch.rand(T, generator=draw, dtype=torch.float64)
        self.leaves = [t for t in (self.hidden, self.weight, self.bias) if t is not None]

    def logits(self):
        return torch.nn.functional.linear(self.hidden, self.weight, self.bias)

    def reference_logits(self):
        return self.reference.hidden_TD @ self.reference.weight_VD.t()

    def stats(self, statistic=None, chunk=7):
        logp, entropy = token_logprobs(self.hidden, self.weight, self.target, bias_V=self.bias, chunk_rows=chunk)
        value = None
        if statistic is not None:
            reference = self.reference if statistic.needs_reference else None
            rows = Rows(self.hidden, self.weight, self.bias)
            value = vocabulary_statistic(statistic, rows, self.target, reference, chunk_rows=chunk)
        return TokenStats(
            logp_T=logp,
            entropy_T=entropy.detach(),
            weight_T=self.scale,
            sequence_T=torch.zeros(T, dtype=torch.long),
            vocabulary_T=value,
        )

    def gradients(self, values):
        return torch.autograd.grad(values.sum(), self.leaves)


def dft(bench):
    """−sg(p) log p, row by row."""
    logp = torch.log_softmax(bench.logits(), -1)[range(T), bench.target]
    return -logp.exp().detach() * logp


def chord_phi(bench):
    logp = torch.log_softmax(bench.logits(), -1)[range(T), bench.target]
    p = logp.exp().detach()
    return -(p * (1 - p)) * logp


def gem(beta, weight):
    def slow(bench):
        """−Σ_v sg(q_v w_v)(ℓ_y − log π_v), as printed."""
        z = bench.logits()
        logp = torch.log_softmax(z, -1)
        rows = []
        for t, y in enumerate(bench.target.tolist()):
            q = torch.softmax(z[t] / beta, 0)
            w = torch.ones(V, dtype=z.dtype) if weight == "linear" else 1 / (1 + torch.exp(-0.01 * (z[t] - z[t, y])))
            rows.append(-sum((q[v] * w[v]).detach() * (logp[t, y] - logp[t, v]) for v in range(V)))
        return torch.stack(rows)

    return slow


def asft(kl):
    def slow(bench):
        ref, logp = (torch.log_softmax(z, -1) for z in (bench.reference_logits(), bench.logits()))
        return dft(bench) + kl * torch.nn.functional.kl_div(logp, ref.exp(), reduction="none").sum(-1)

    return slow


def eaft(alpha):
    def slow(bench):
        z = bench.logits()
        rows = []
        for t, y in enumerate(bench.target.tolist()):
            top = sorted(z[t].tolist(), reverse=True)[:20]
            total = sum(math.exp(v) for v in top)
            entropy = -sum(math.exp(v) / total * math.log(math.exp(v) / total) for v in top)
            rows.append(-((entropy / 3) ** alpha) * torch.log_softmax(z[t], 0)[y])
        return torch.stack(rows)

    return slow


CASES = {
    "dft": (DynamicFineTuning(), None, dft),
    "chord_phi": (ChordPhi(), None, chord_phi),
    "gem": (GameEntropy(), GemObjective(0.7, "logsigmoid"), gem(0.7, "logsigmoid")),
    "gem-linear": (GameEntropy(), GemObjective(0.5, "linear"), gem(0.5, "linear")),
    "asft": (AnchoredFineTuning(0.05), KlFromReference(), asft(0.05)),
    "asft-strong": (AnchoredFineTuning(2.0), KlFromReference(), asft(2.0)),
    "eaft": (EntropyAdaptive(1.0), TopLogitEntropy(EAFT_TOP), eaft(1.0)),
    "eaft-squared": (EntropyAdaptive(2.0), TopLogitEntropy(EAFT_TOP), eaft(2.0)),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_slow_version(name, bias):
    loss, statistic, slow = CASES[name]
    bench = Bench(bias=bias)
    mine, theirs = loss(bench.stats(statistic)), bench.scale * slow(bench)
    torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)
    for a, b in zip(bench.gradients(mine), bench.gradients(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_no_two_losses_have_the_same_gradient(name):
    bench = Bench()
    mine = bench.gradients(CASES[name][0](bench.stats(CASES[name][1])))[0]
    for other in CASES:
        if other != name:
            theirs = bench.gradients(CASES[other][0](bench.stats(CASES[other][1])))[0]
            assert float((mine - theirs).norm()) > 1e-2 * float(mine.norm()), other


@pytest.mark.parametrize("statistic", [GemObjective(0.7, "logsigmoid"), KlFromReference(), TopLogitEntropy(20)])
def test_chunks_do_not_change_the_result(statistic):
    bench = Bench()
    whole, parts = (bench.stats(statistic, chunk).vocabulary_T for chunk in (T, 2))
    torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-13)
    if statistic.has_gradient:
        for a, b in zip(bench.gradients(whole), bench.gradients(parts), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_slopes_are_finite_differences_where_nothing_is_a_constant():
    bench = Bench()
    z, step = bench.logits().detach(), 1e-6
    statistic, reference = KlFromReference(), bench.reference_logits()
    slope = statistic.slope(z, bench.target, reference)
    for v in range(0, V, 5):
        moved = z.clone()
        moved[:, v] += step
        rise = (statistic.value(moved, bench.target, reference) - statistic.value(z, bench.target, reference)) / step
        torch.testing.assert_close(rise, slope[:, v], rtol=1e-4, atol=1e-6)


def test_gem_with_beta_one_and_linear_weights_has_the_gradient_of_cross_entropy():
    bench = Bench()
    mine = bench.gradients(GameEntropy()(bench.stats(GemObjective(1.0, "linear"))))
    theirs = bench.gradients(CrossEntropy()(bench.stats()))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_dft_has_the_gradient_of_minus_p():
    bench = Bench()
    mine = bench.gradients(DynamicFineTuning()(bench.stats()))
    theirs = bench.gradients(-bench.scale * torch.softmax(bench.logits(), -1)[range(T), bench.target])
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_first_update_of_psft_is_sft_and_a_token_that_grew_is_silent():
    bench = Bench()
    loss = PolicyGradient(clip_low=None, clip_high=0.28)
    mine, theirs = (bench.gradients(f(bench.stats())) for f in (loss, CrossEntropy()))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
    logp = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64, requires_grad=True)
    grew, fell, same = -1.0 - math.log(1.3), -1.0 + math.log(4.0), -1.0
    stats = TokenStats(
        logp_T=logp,
        entropy_T=logp.detach(),
        weight_T=torch.ones(3, dtype=torch.float64),
        sequence_T=torch.zeros(3, dtype=torch.long),
        old_logp_T=torch.tensor([grew, fell, same], dtype=torch.float64),
    )
    values = loss(stats)
    assert values.tolist() == pytest.approx([-1.28, -0.25, -1.0])
    values.sum().backward()
    assert logp.grad.tolist() == pytest.approx([0.0, -0.25, -1.0])


def test_asft_without_its_anchor_is_dft():
    bench = Bench()
    mine = bench.gradients(AnchoredFineTuning(0.0)(bench.stats(KlFromReference())))
    theirs = bench.gradients(DynamicFineTuning()(bench.stats()))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_impossible_tokens_have_no_part():
    logits = torch.tensor([[0.0, 1.0, float("-inf"), 2.0]], dtype=torch.float64)
    target, kept = torch.tensor([1]), [0, 1, 3]
    for statistic in (GemObjective(0.7, "logsigmoid"), GemObjective(1.0, "linear"), TopLogitEntropy(20)):
        expected = statistic.value(logits[:, kept], target, None)
        torch.testing.assert_close(statistic.value(logits, target, None), expected)
        if statistic.has_gradient:
            slope = statistic.slope(logits, target, None)
            torch.testing.assert_close(slope[:, kept], statistic.slope(logits[:, kept], target, None))
            assert float(slope[0, 2]) == 0.0
    expected = KlFromReference().value(logits[:, kept], target, logits[:, kept] * 0.5)
    torch.testing.assert_close(KlFromReference().value(logits, target, logits * 0.5), expected)


def test_rows_without_gradient_never_meet_the_backward_pass(monkeypatch):
    bench, seen = Bench(), []
    value = bench.stats(GemObjective(0.7, "logsigmoid")).vocabulary_T
    plain = vocabulary.logits_of
    monkeypatch.setattr(vocabulary, "logits_of", lambda h, w, b: seen.append(len(h)) or plain(h, w, b))
    mask = torch.zeros(T, dtype=torch.float64)
    mask[[3, 17]] = 1.0
    (value * mask).sum().backward()
    assert sum(seen) == 2
    assert bench.hidden.grad.abs().sum(1).count_nonzero() == 2


def test_statistics_of_bfloat16_are_made_in_fp32():
    bench = Bench()
    rows = Rows(bench.hidden.detach().bfloat16().requires_grad_(), bench.weight.detach().float().requires_grad_())
    value = vocabulary_statistic(GemObjective(0.7, "logsigmoid"), rows, bench.target)
    assert value.dtype == torch.float32
    value.sum().backward()
    assert (rows.hidden_TD.grad.dtype, rows.weight_VD.grad.dtype) == (torch.bfloat16, torch.float32)
    exact = rows.hidden_TD.detach().double() @ rows.weight_VD.detach().bfloat16().double().t()
    expected = GemObjective(0.7, "logsigmoid").value(exact, bench.target, None)
    assert float((value.detach().double() - expected).abs().max()) < 0.1


def test_no_tokens():
    rows = Rows(torch.zeros(0, 3), torch.randn(5, 3))
    assert vocabulary_statistic(TopLogitEntropy(20), rows, torch.zeros(0, dtype=torch.long)).shape == (0,)
