"""Responses that begin with a demonstration's tokens: what a stream sees, what divides, what is compared with the sampler."""

import random
from dataclasses import replace

import pytest
import torch
from builders import make_sequences
from test_invariance import gradient, plain_forward

from mifo.config.schema import OptimizerConfig
from mifo.core.losses import CrossEntropy, EntropyBonus, PolicyGradient
from mifo.train.gap import SamplerWatch
from mifo.train.learner import Learner
from mifo.train.model import tiny_model
from mifo.train.optim import ScheduledAdamW
from mifo.train.parallel import World
from mifo.train.policy import Policy
from mifo.train.rows import counted_tokens, demonstrated
from mifo.train.selection import select_prefixes
from mifo.types import Term, TopEntropy, TopPrefixEntropy, Update

LENGTHS, PREFIXES = [9, 4, 17, 6, 30], [3, 0, 16, 0, 11]


@pytest.fixture(scope="module")
def policy():
    return Policy(tiny_model(seed=1, hidden=32).double())


def sequences_of(policy, terms, **settings):
    vocabulary = policy.model.get_input_embeddings().num_embeddings
    made = make_sequences(LENGTHS, vocabulary=vocabulary, terms=[t.name for t in terms], group=2, **settings)
    return tuple(
        replace(s, prefix_tokens=p, sampler_logprobs=s.sampler_logprobs[p:])
        for s, p in zip(made, PREFIXES, strict=True)
    )


def span_of(name, sequence):
    places = range(len(sequence.response_ids))
    if name == "prefix":
        return [t for t in places if t < sequence.prefix_tokens]
    return [t for t in places if name == "response" or t >= sequence.prefix_tokens]


@pytest.mark.parametrize("budget", [30, 10**6])
@pytest.mark.parametrize(("normalizer", "constant"), [("token", None), ("sequence", None), ("constant", 40)])
@pytest.mark.parametrize("span", ["response", "prefix", "continuation"])
def test_a_stream_sees_and_counts_its_span(policy, span, normalizer, constant, budget):
    term = Term(name="ce", loss=CrossEntropy(), span=span, normalizer=normalizer, constant_tokens=constant)
    sequences = sequences_of(policy, [term])
    spans = [span_of(span, s) for s in sequences]
    assert [counted_tokens(term, s) for s in sequences] == list(map(len, spans))
    count = sum(bool(places) for places in spans)
    total = torch.zeros((), dtype=torch.float64)
    for s, places in zip(sequences, spans, strict=True):
        if places:
            divisor = {"token": sum(map(len, spans)), "sequence": count * len(places), "constant": count * 40}
            total = total - s.weights["ce"] * plain_forward(policy.model, s)[0][places].sum() / divisor[normalizer]
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(total, policy.parameters)])
    found, loss = gradient(policy, Update(sequences=sequences, terms=(term,)), budget=budget)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert loss == pytest.approx(float(total.detach()), rel=1e-9)


def test_top_entropy_within_a_span_ranks_the_span_alone(policy):
    term = Term(name="ce", loss=CrossEntropy(), span="prefix", select=TopEntropy(fraction=0.3), denominator="kept")
    sequences = sequences_of(policy, [term])
    total, counted = torch.zeros((), dtype=torch.float64), 0
    for s in sequences:
        logp, entropy = plain_forward(policy.model, s)
        places = sorted(range(s.prefix_tokens), key=lambda t: (-float(entropy[t].detach()), t))
        places = places[: -(-3 * s.prefix_tokens // 10)]
        assert counted_tokens(term, s) == len(places)
        total, counted = total - s.weights["ce"] * logp[places].sum(), counted + len(places)
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(total / counted, policy.parameters)])
    found, _ = gradient(policy, Update(sequences=sequences, terms=(term,)), budget=30)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


PG = Term(name="pg", loss=PolicyGradient(), uses_old_policy=True, select=TopPrefixEntropy(fraction=0.2))
ENT = Term(name="ent", loss=EntropyBonus(), coefficient=0.1, uses_entropy_gradient=True)


def kept_places(policy, sequences, fraction):
    """(sequence, token) of the ⌈fraction·n⌉ prefix tokens of highest entropy of the whole update, by sorting them."""
    everything = []
    for i, s in enumerate(sequences):
        _, entropy = plain_forward(policy.model, s)
        everything += [(-float(entropy[t].detach().float()), i, t) for t in range(s.prefix_tokens)]
    count = -(-round(fraction * 100) * len(everything) // 100)
    return {(i, t) for _, i, t in sorted(everything)[:count]}, len(everything)


@pytest.mark.parametrize("budget", [30, 10**6])
def test_top_prefix_entropy_is_one_ranking_over_the_whole_update(policy, budget):
    sequences = sequences_of(policy, [PG, ENT])
    kept, ranked = kept_places(policy, sequences, 0.2)
    assert (len(kept), ranked) == (6, 30)
    total, tokens = torch.zeros((), dtype=torch.float64), sum(LENGTHS)
    for i, s in enumerate(sequences):
        logp, entropy = plain_forward(policy.model, s)
        learned = [t for t in range(len(logp)) if t >= s.prefix_tokens or (i, t) in kept]
        total = total - s.weights["pg"] * torch.exp(logp - logp.detach())[learned].sum() / tokens
        total = total - 0.1 * s.weights["ent"] * entropy.sum() / tokens
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(total, policy.parameters)])
    found, _ = gradient(policy, Update(sequences=sequences, terms=(PG, ENT)), budget=budget)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_ranking_by_sequence_or_micro_batch_would_keep_others(policy):
    """The tempting forms differ: a ranking within each sequence keeps at least one token of every prefix."""
    sequences = sequences_of(policy, [PG])
    kept, _ = kept_places(policy, sequences, 0.2)
    by_sequence = {(i, t) for i, s in enumerate(sequences) for _, t in kept_places(policy, [s], 0.2)[0]}
    assert kept != by_sequence


def test_selection_does_not_depend_on_order_and_looks_at_silent_sequences_too(policy):
    """A hybrid without advantage is not learned, but its tokens are ranked with the others."""
    sequences = list(sequences_of(policy, [PG]))
    learner = Learner(policy, micro_batch_tokens=40)

    def scores(chosen):
        return learner._scores(chosen, policy)

    def chosen(row):
        made = select_prefixes(Update(sequences=tuple(row), terms=(PG,)), scores, World()).sequences
        return {s.response_ids: s.weights["pg"] for s in made if s.prefix_tokens}

    plain = chosen(sequences)
    random.Random(2).shuffle(sequences)
    assert chosen(sequences) == plain
    longest = max(sequences, key=lambda s: s.prefix_tokens)
    silent = [replace(s, weights={"pg": 0.0}) if s is longest else s for s in sequences]
    for response, weights in chosen(silent).items():
        if response != longest.response_ids:
            assert weights == plain[response]
    hybrids = [s for s in sequences if s.prefix_tokens]
    fewer = [chosen([s for s in sequences if s is not left_out]) for left_out in hybrids]
    assert any(weights != plain[response] for row in fewer for response, weights in row.items())


def test_an_update_without_such_a_term_is_left_as_it_is(policy):
    update = Update(sequences=sequences_of(policy, [ENT]), terms=(ENT,))

    def scores(chosen):
        raise AssertionError("a pass that nobody asked for")

    assert select_prefixes(update, scores, World()) is update


def test_entropies_that_are_not_finite_are_left_to_the_gradient(policy):
    update = Update(sequences=sequences_of(policy, [PG]), terms=(PG,))
    bad = [(torch.zeros(p), torch.full((p,), float("nan"))) for p in PREFIXES if p]
    made = select_prefixes(update, lambda chosen: bad, World())
    assert made.sequences == update.sequences
    assert made.terms[0].select is None


def test_the_gap_looks_at_sampled_tokens_only(policy):
    """Fed, unfed with π_old at hand, and unfed without it."""
    term = replace(PG, select=None)
    sequences = sequences_of(policy, [term])
    learner = Learner(policy, micro_batch_tokens=10**6, sampler_watch=SamplerWatch(None, torch.float32))
    own = learner.logprobs(sequences)
    gaps = [
        abs(a - b)
        for s, row in zip(sequences, own, strict=True)
        for a, b in zip(s.sampler_logprobs, row[s.prefix_tokens :], strict=True)
    ]
    mean = pytest.approx(sum(gaps) / len(gaps), rel=1e-6)
    assert len(gaps) == sum(LENGTHS) - sum(PREFIXES)
    optimizer = ScheduledAdamW(policy.parameters, OptimizerConfig(learning_rate=1e-12))
    assert learner.apply(Update(sequences=sequences, terms=(term,)), optimizer).sampler_gap == mean
    silent = tuple(replace(s, weights={"pg": 0.0}) for s in sequences)
    assert learner.apply(Update(sequences=silent, terms=(term,)), optimizer).sampler_gap == mean
    known = Update(sequences=silent, terms=(term,), old_logprobs=tuple(own))
    assert learner.apply(known, optimizer).sampler_gap == mean


def test_importance_weights_of_a_prefix_are_one(policy):
    """What was not sampled has nothing to correct: the weighted gradient differs on continuations alone."""
    plain = Term(name="pg", loss=PolicyGradient(), uses_old_policy=True)
    capped = Term(name="pg", loss=PolicyGradient(importance_cap=5.0), uses_old_policy=True, uses_sampler=True)
    sequences = sequences_of(policy, [plain])
    total, tokens = torch.zeros((), dtype=torch.float64), sum(LENGTHS)
    for s in sequences:
        logp, _ = plain_forward(policy.model, s)
        sampler = torch.cat([logp.detach()[: s.prefix_tokens], torch.tensor(s.sampler_logprobs, dtype=torch.float64)])
        weight = torch.exp(logp.detach() - sampler).clamp(max=5.0)
        total = total - (weight * s.weights["pg"] * torch.exp(logp - logp.detach())).sum() / tokens
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(total, policy.parameters)])
    found, _ = gradient(policy, Update(sequences=sequences, terms=(capped,)), budget=30)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_the_old_policy_of_a_prefix_is_the_trainer_s(policy):
    """The ratio of a later update is π/π_old on the prefix too, not 1 and not π."""
    term = replace(PG, select=None)
    sequences = sequences_of(policy, [term])
    old = tuple(tuple(p - 0.05 for p in row) for row in Learner(policy, micro_batch_tokens=50).logprobs(sequences))
    total, tokens = torch.zeros((), dtype=torch.float64), sum(LENGTHS)
    for s, row in zip(sequences, old, strict=True):
        logp, _ = plain_forward(policy.model, s)
        ratio = torch.exp(logp - torch.tensor(row, dtype=torch.float64))
        a = s.weights["pg"]
        total = total - torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).sum() / tokens
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(total, policy.parameters)])
    found, _ = gradient(policy, Update(sequences=sequences, terms=(term,), old_logprobs=old), budget=30)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)


def test_demonstrations_that_rollouts_continue_are_used(policy):
    sequences = sequences_of(policy, [PG])
    assert [s.problem_id for s in sequences] == ["p0", "p0", "p1", "p1", "p2"]
    assert demonstrated([Update(sequences=sequences, terms=(PG,))]) == ["p0", "p1", "p2"]
    hints = [replace(s, prefix_tokens=0, hint_tokens=s.prefix_tokens) for s in sequences]
    hints[4] = replace(hints[4], weights={"pg": 0.0})
    hints.append(replace(hints[0], sampler_logprobs=None, hint_tokens=0))
    assert demonstrated([Update(sequences=tuple(hints), terms=(PG,))]) == ["p0", "p1"]
