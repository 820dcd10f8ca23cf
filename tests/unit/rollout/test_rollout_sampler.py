"""The sampler as a distribution, its tail, its ties and its log-probs."""

from __future__ import annotations

import math

import pytest
import torch

from mifo.rollout.sampler import Uniforms, sample
from mifo.types import Sampling

ALMOST_ONE = 1 - 2**-53


def chi_square_z(counts, probabilities):
    """The chi-square statistic as a standard normal deviate (Wilson and Hilferty 1931); rare cells are pooled."""
    draws = counts.sum()
    order = probabilities.argsort(descending=True)
    expected, seen = probabilities[order].double() * draws, counts[order].double()
    common = int((expected >= 5).sum())
    expected = torch.cat((expected[:common], expected[common:].sum()[None]))
    seen = torch.cat((seen[:common], seen[common:].sum()[None]))
    if expected[-1] < 1e-9:
        assert seen[-1] == 0
        expected, seen = expected[:-1], seen[:-1]
    freedom = len(expected) - 1
    statistic = float(((seen - expected) ** 2 / expected).sum())
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))


def reference(logits, temperature, top_p):
    """The sampling distribution by a full stable sort in fp64."""
    p = (logits.double() / temperature).softmax(-1)
    values, order = p.sort(descending=True, stable=True)
    keep = order[(values.cumsum(0) - values) < top_p - 1e-12]
    nucleus = torch.zeros_like(p)
    nucleus[keep] = p[keep]
    return nucleus / nucleus.sum()


def draw_counts(draw, logits, draws, seed=0):
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(len(logits))
    for _ in range(draws // 2000):
        u = torch.rand(2000, dtype=torch.float64, generator=generator)
        counts += torch.bincount(draw(logits.expand(2000, -1), u), minlength=len(logits))
    return counts


@pytest.mark.parametrize("vocab", [97, 256, 1003])
@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.7, 1.0), (1.0, 0.9), (0.7, 0.9)])
def test_samples_follow_the_distribution(vocab, temperature, top_p):
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)) * 1.5
    sampling = Sampling(temperature=temperature, top_p=top_p)
    counts = draw_counts(lambda x, u: sample(x, sampling, u).token_B, logits, 20_000)
    assert abs(chi_square_z(counts, reference(logits, temperature, top_p))) < 4


def remainder_dropped(logits_BV, u_B):
    """The tempting form: whole chunks of 256 only."""
    p = logits_BV.softmax(-1)[:, : logits_BV.shape[1] // 256 * 256]
    cumulative = p.double().cumsum(-1)
    return torch.searchsorted(cumulative, u_B[:, None] * cumulative[:, -1:], right=True)[:, 0]


def not_tempered(logits_BV, u_B):
    return sample(logits_BV, Sampling(), u_B).token_B


@pytest.mark.parametrize(("wrong", "temperature"), [(remainder_dropped, 1.0), (not_tempered, 0.7)])
def test_the_distribution_test_catches_wrong_samplers(wrong, temperature):
    logits = torch.randn(1003, generator=torch.Generator().manual_seed(1003)) * 1.5
    counts = draw_counts(wrong, logits, 20_000)
    assert chi_square_z(counts, reference(logits, temperature, 1.0)) > 8


@pytest.mark.parametrize("vocab", [49152, 151936])
def test_every_token_of_a_flat_distribution_owns_its_share_of_u(vocab):
    token = torch.cat((torch.arange(40), torch.randint(0, vocab, (80,)), torch.arange(vocab - 40, vocab)))
    u = (token.double() + 0.5) / vocab
    logits = torch.zeros(1, vocab).expand(len(token), -1)
    assert torch.equal(sample(logits, Sampling(), u).token_B, token)


def test_a_thin_tail_keeps_its_resolution():
    """One token holds all but 1e-4; the others, 1e-9 each, are below the spacing of fp32 numbers at 1."""
    vocab = 100_001
    logits = torch.full((1, vocab), math.log(1e-9))
    logits[0, 0] = math.log(1 - 1e-4)
    u = 1 - 1e-4 + (40_000.5 + torch.arange(1500, dtype=torch.float64)) * 1e-9
    token = sample(logits.expand(len(u), -1), Sampling(), u).token_B
    assert len(token.unique()) > 1490
    assert (token - 40_001 - torch.arange(1500)).abs().max() < 200  # the fp32 sums of the chunks: 1e-7 of the whole
    single = torch.searchsorted(logits[0].softmax(-1).cumsum(0), u.float(), right=True)  # the tempting form
    assert len(single.unique()) < 50


@pytest.mark.parametrize("vocab", [97, 256, 1003, 49152, 151936])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_extreme_u_gives_tokens_that_have_probability(vocab, top_p):
    logits = torch.full((2, vocab), float("-inf"))
    logits[:, 5], logits[:, vocab - 30] = 0.0, -0.1  # the last chunk ends in tokens of probability zero
    draw = sample(logits, Sampling(top_p=top_p), torch.tensor([0.0, ALMOST_ONE], dtype=torch.float64))
    assert draw.token_B.tolist() == [5, vocab - 30]


def test_underflowed_tokens_at_the_end_are_never_drawn():
    logits = torch.zeros(1, 1000)
    logits[:, 300:] = -200.0  # exp underflows: whole chunks of weight zero behind the last token that has any
    for u in (ALMOST_ONE, 1.0):  # 1.0: rounding within a chunk can carry the target to the total
        assert sample(logits, Sampling(), torch.tensor([u], dtype=torch.float64)).token_B.tolist() == [299]


def test_hand_computed_nucleus_and_renormalised_logprob():
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()[None]
    u = torch.tensor([0.0, 0.6, ALMOST_ONE], dtype=torch.float64)
    rows = logits.expand(3, -1)
    exactly = sample(rows, Sampling(top_p=0.75), u)
    assert exactly.token_B.tolist() == [0, 0, 1]  # 0.5 + 0.25 reaches 0.75: two tokens are enough
    assert exactly.logp_B.exp().tolist() == pytest.approx([2 / 3, 2 / 3, 1 / 3])
    more = sample(rows, Sampling(top_p=0.76), u)
    assert more.token_B.tolist() == [0, 1, 2]  # of the equal tokens 2 and 3 the first index enters, and only it
    assert more.logp_B.exp().tolist() == pytest.approx([4 / 7, 2 / 7, 1 / 7])


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.999])
def test_nucleus_is_exact_under_ties(top_p):
    logits = (torch.randn(503, generator=torch.Generator().manual_seed(3)) * 2).bfloat16()  # many equal values
    expected = reference(logits.float(), 1.0, top_p)
    u = (torch.arange(40_000, dtype=torch.float64) + 0.5) / 40_000
    draw = sample(logits.expand(len(u), -1), Sampling(top_p=top_p), u)
    shares = torch.bincount(draw.token_B, minlength=503) / len(u)
    assert torch.allclose(shares.double(), expected, atol=1.1 / len(u), rtol=0)
    assert torch.allclose(draw.logp_B.double(), expected[draw.token_B].log(), atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1e-6])
def test_logprob_is_that_of_the_tempered_distribution(temperature):
    logits = torch.randn(64, 1003, generator=torch.Generator().manual_seed(2)) * 4
    u = torch.rand(64, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    draw = sample(logits, Sampling(temperature=temperature), u)
    expected = (logits.double() / temperature).log_softmax(-1).gather(1, draw.token_B[:, None])[:, 0]
    assert torch.allclose(draw.logp_B.double(), expected, atol=1e-5)


@pytest.mark.parametrize("vocab", [7, 97, 256, 1003])
def test_greedy_is_the_first_maximum_with_probability_one(vocab):
    logits = torch.randint(0, 6, (50, vocab), generator=torch.Generator().manual_seed(0)).float()  # ties everywhere
    draw = sample(logits, Sampling(temperature=0), None)
    assert draw.token_B.tolist() == [row.index(max(row)) for row in logits.tolist()]
    assert draw.logp_B.tolist() == [0.0] * 50


def test_rows_do_not_depend_on_the_blocks_they_are_computed_in():
    logits = torch.randn(70, 49152, generator=torch.Generator().manual_seed(0)).bfloat16()
    u = torch.rand(70, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    together = sample(logits, Sampling(), u)
    alone = [sample(logits[b : b + 1], Sampling(), u[b : b + 1]) for b in range(70)]
    assert torch.equal(together.token_B, torch.cat([d.token_B for d in alone]))
    assert torch.equal(together.logp_B, torch.cat([d.logp_B for d in alone]))


def test_broken_logits_give_a_valid_token_and_a_logprob_that_shows_it():
    logits = torch.zeros(3, 300)
    logits[0, 7], logits[1, 7] = float("nan"), float("inf")
    u = torch.full((3,), 0.5, dtype=torch.float64)
    for sampling in (Sampling(), Sampling(temperature=0)):
        draw = sample(logits, sampling, u)
        assert draw.token_B.min() >= 0
        assert draw.token_B.max() < 300
        assert torch.isfinite(draw.logp_B).tolist() == [False, False, True]


def test_uniforms_belong_to_prompt_rollout_and_step():
    rows = torch.arange(6)
    both = Uniforms(7, [0, 5], 3)
    columns = [both.column(t, rows) for t in range(130)]
    only = Uniforms(7, [5], 3)
    assert all(torch.equal(only.column(t, rows[:3]), columns[t][3:]) for t in range(130))
    assert len(torch.cat(columns).unique()) == 6 * 130
    assert not torch.equal(Uniforms(8, [0, 5], 3).column(0, rows), columns[0])
