"""Each imitation loss through the learner: the gradient of the whole update equals that of the textbook version."""

import pytest
import torch
from builders import make_sequences

from mifo.config.schema import ImitationConfig
from mifo.methods.sft import imitation_update, imitation_updates
from mifo.train.learner import Learner
from mifo.train.model import tiny_model
from mifo.train.policy import Policy
from mifo.types import Demonstration

LENGTHS = [4, 9, 1, 6, 12]
LOSSES = ["cross_entropy", "dft", "gem", "psft", "asft", "eaft", "chord_phi"]


@pytest.fixture(scope="module")
def policies():
    return Policy(tiny_model(seed=0).double()), Policy(tiny_model(seed=1).double().requires_grad_(False))


def demonstrations(policy):
    return [
        Demonstration(problem_id=s.problem_id, prompt_ids=s.prompt_ids, response_ids=s.response_ids)
        for s in make_sequences(LENGTHS, vocabulary=policy.model.config.vocab_size, terms=["ce"])
    ]


def update_of(policy, loss, **settings):
    return imitation_update(
        ImitationConfig(loss=loss, **settings),
        demonstrations(policy),
        token_fraction=1.0,
        token_denominator="all",
        longest_demonstration=20,
    )


def token_loss(loss, logits, target, reference):
    """The paper's formula on the logits of one response, [n, V]."""
    every = torch.log_softmax(logits, -1)
    logp = every[range(len(target)), target]
    p = logp.exp().detach()
    if loss in ("cross_entropy", "psft"):  # on the first update they have the same gradient
        return -logp
    if loss == "dft":
        return -p * logp
    if loss == "chord_phi":
        return -p * (1 - p) * logp
    if loss == "asft":
        ref = torch.log_softmax(reference, -1)
        return -p * logp + 0.05 * (ref.exp() * (ref - every)).sum(-1)
    if loss == "eaft":
        top = torch.log_softmax(logits.topk(20, -1).values, -1)
        return -(-(top.exp() * top).sum(-1) / 3).detach() * logp
    q = torch.softmax(logits / 0.7, -1)
    w = torch.sigmoid(0.01 * (logits - logits[range(len(target)), target][:, None]))
    return -((q * w).detach() * (logp[:, None] - every)).sum(-1)


def slow_gradient(loss, policy, reference, update):
    total, tokens = 0.0, sum(LENGTHS)
    for s in update.sequences:
        ids = torch.tensor([s.prompt_ids + s.response_ids])
        rows = slice(len(s.prompt_ids) - 1, -1)
        with torch.no_grad():
            ref = reference.model(input_ids=ids, use_cache=False).logits[0, rows]
        logits = policy.model(input_ids=ids, use_cache=False, attention_mask=torch.ones_like(ids)).logits[0, rows]
        total = total + token_loss(loss, logits, torch.tensor(s.response_ids), ref).sum() / tokens
    return torch.autograd.grad(total, policy.parameters)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("micro_batch_tokens", [10, 10**6])
def test_the_gradient_is_that_of_the_formula_however_the_update_is_cut(policies, loss, micro_batch_tokens):
    policy, reference = policies
    update = update_of(policy, loss)
    plain = Policy(tiny_model(seed=0).double(), layout="padded")  # its attention is the library's own
    plain_reference = Policy(tiny_model(seed=1).double(), layout="padded")
    expected = slow_gradient(loss, plain, plain_reference, update)
    learner = Learner(policy, micro_batch_tokens=micro_batch_tokens, reference=reference)
    assert learner.accumulate(update).faults == 0
    for parameter, wanted in zip(learner.parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-6, atol=1e-9)
    learner._clear()


def test_the_learner_computes_whole_distributions_only_where_a_term_asks(policies, monkeypatch):
    policy, reference = policies
    calls = []
    plain = policy.vocabulary_stats
    monkeypatch.setattr(policy, "vocabulary_stats", lambda *args: calls.append(args[1]) or plain(*args))
    learner = Learner(policy, micro_batch_tokens=10**6, reference=reference)
    for loss in ("dft", "gem"):
        learner.accumulate(update_of(policy, loss))
    assert len(calls) == 1


def test_psft_holds_tokens_back_that_the_first_update_of_a_batch_moved(policies):
    """Updates after the first look at the policy before any of them; a token that grew by more than ε_h is silent."""
    policy, _ = policies
    settings = ImitationConfig(loss="psft", psft_clip=0.1, updates_per_batch=2)
    updates = imitation_updates(
        settings, demonstrations(policy), token_fraction=1.0, token_denominator="all", longest_demonstration=20
    )
    assert [len(u.sequences) for u in updates] == [3, 2]
    learner = Learner(policy, micro_batch_tokens=10**6)
    old = [
        tuple(p - 0.2 for p in row) for row in learner.logprobs(updates[1].sequences)
    ]  # every token has grown by 22 %
    moved = type(updates[1])(sequences=updates[1].sequences, terms=updates[1].terms, old_logprobs=tuple(old))
    tally = learner.accumulate(moved)
    assert tally.clipped == tally.tokens == sum(LENGTHS[3:])
    assert all(float(p.grad.abs().max()) == 0.0 for p in learner.parameters)
    learner._clear()


def test_a_statistic_that_is_not_finite_is_blamed_on_its_sequence(policies, monkeypatch):
    policy, _ = policies
    plain = policy.vocabulary_stats

    def broken(*arguments):
        logp, entropy, value = plain(*arguments)
        return logp, entropy, value + torch.tensor([float("nan")] + [0.0] * (len(value) - 1))

    monkeypatch.setattr(policy, "vocabulary_stats", broken)
    learner = Learner(policy, micro_batch_tokens=10**6)
    tally = learner.accumulate(update_of(policy, "gem"))
    assert tally.faults == 1
    assert tally.samples[0].what == "vocabulary statistic"
