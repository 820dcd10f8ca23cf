"""The second model through the learner: whole updates against slow versions in fp64, and what a value may know."""

import copy

import pytest
import torch
from builders import make_sequences
from test_invariance import plain_forward

from mifo.config.decode import decode
from mifo.config.schema import Config
from mifo.core.critic import ClippedValue
from mifo.core.process_reward import OutcomeCrossEntropy
from mifo.train.learner import Learner
from mifo.train.model import tiny_model
from mifo.train.policy import Policy
from mifo.train.scorer import make_scorer
from mifo.types import Term, Update

LENGTHS = [4, 9, 1, 6, 12, 3]
VALUE = Term(name="value", loss=ClippedValue(0.3), uses_old_policy=True, uses_target=True)
PRM = Term(name="prm", loss=OutcomeCrossEntropy(0.3), normalizer="sequence", uses_reference=True, uses_target=True)


def window():
    from contextlib import nullcontext

    return nullcontext()


@pytest.fixture(scope="module")
def policy():
    return Policy(tiny_model(seed=1, hidden=32).double())


@pytest.fixture(scope="module")
def reference():
    return Policy(tiny_model(seed=2, hidden=32).double().requires_grad_(False))


def scorer_of(name, policy, reference=None, **train):
    config = decode(Config, {"method": {"name": "ppo" if name == "critic" else "prime"}, "train": train})
    return make_scorer(name, policy, config, reference=reference, window=window)


def with_head(critic, seed=0):
    """Weights in the head, which starts at zero."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in critic.learner.policy.head.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype))
    return critic


def sequences_of(policy, name, target):
    made = make_sequences(LENGTHS, vocabulary=policy.model.config.vocab_size, terms=[name], group=2)
    fields = made[0].__dataclass_fields__
    return [
        type(s)(**{f: getattr(s, f) for f in fields} | {"weights": {name: 1.0}, "sampler_logprobs": None, "target": target(i, s)})
        for i, s in enumerate(made)
    ]  # fmt: skip


def plain_values(model, sequence):
    """Values from an ordinary call of the whole model: its scalar head is where logits come from."""
    ids = torch.tensor([sequence.prompt_ids + sequence.response_ids])
    return model(input_ids=ids).logits[0, len(sequence.prompt_ids) - 1 : -1, 0]


def test_the_critic_begins_with_the_policy_s_body_and_values_of_zero(policy):
    critic = scorer_of("critic", policy)
    sequences = sequences_of(policy, "value", lambda i, s: 0.0)
    assert {v for row in critic.scores(sequences) for v in row} == {0.0}
    own = dict(critic.learner.policy.model.named_parameters())
    head = policy.head.weight
    shared = {name: p for name, p in policy.model.named_parameters() if "lm_head" not in name}
    assert all(torch.equal(own[name], p) for name, p in shared.items())
    assert all(own[name].data_ptr() != p.data_ptr() for name, p in shared.items())
    assert critic.learner.policy.head.weight.shape == (1, head.shape[1])
    assert policy.head.weight is head


def test_values_are_those_before_their_token_whatever_the_packing(policy):
    critic = with_head(scorer_of("critic", policy, micro_batch_tokens=30))
    whole = with_head(scorer_of("critic", policy))
    sequences = sequences_of(policy, "value", lambda i, s: 0.0)
    model = whole.learner.policy.model
    for row, cut, sequence in zip(whole.scores(sequences), critic.scores(sequences), sequences, strict=True):
        assert row == pytest.approx(plain_values(model, sequence).tolist(), rel=1e-9)
        assert cut == pytest.approx(row, rel=1e-9)
    other = [type(s)(**{f: getattr(s, f) for f in s.__dataclass_fields__} | {"response_ids": (*s.response_ids[:-1], 3)})
             for s in sequences]  # fmt: skip
    assert whole.scores(other) == whole.scores(sequences)  # the last token is not known to any value


@pytest.mark.parametrize("budget", [30, 10**6])
def test_the_critic_s_gradient_is_that_of_the_value_loss(policy, budget):
    critic = with_head(scorer_of("critic", policy, micro_batch_tokens=budget))
    sequences = sequences_of(policy, "value", lambda i, s: tuple(0.1 * t - 0.2 * i for t in range(len(s.response_ids))))
    old = [tuple(v + 0.4 * (-1) ** t for t, v in enumerate(row)) for row in critic.scores(sequences)]
    update = Update(sequences=tuple(sequences), terms=(VALUE,), old_logprobs=tuple(old))
    tally = critic.learner.accumulate(update)
    found = torch.cat([p.grad.reshape(-1) for p in critic.learner.parameters])
    critic.learner._clear()

    model, total = critic.learner.policy.model, 0.0
    for sequence, before in zip(sequences, old, strict=True):
        value, was = plain_values(model, sequence), torch.tensor(before, dtype=torch.float64)
        target = torch.tensor(sequence.target, dtype=torch.float64)
        near = torch.minimum(torch.maximum(value, was - 0.3), was + 0.3)
        total = total + 0.5 * torch.maximum((value - target) ** 2, (near - target) ** 2).sum() / sum(LENGTHS)
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(total, critic.learner.parameters)])
    assert float(expected.norm()) > 1e-3
    assert float((found - expected).norm() / expected.norm()) < 1e-9
    assert tally.losses["value"] == pytest.approx(float(total.detach()), rel=1e-9)


def test_returns_of_zero_are_learned_too(policy):
    """A wrong answer has return 0 everywhere; a rule that skips weights of zero must not skip it."""
    critic = with_head(scorer_of("critic", policy))
    sequences = sequences_of(policy, "value", lambda i, s: (0.0,) * len(s.response_ids))
    old = tuple(map(tuple, critic.scores(sequences)))
    tally = critic.learner.accumulate(Update(sequences=tuple(sequences), terms=(VALUE,), old_logprobs=old))
    assert tally.tokens == sum(LENGTHS)
    assert sum(float(p.grad.norm()) for p in critic.learner.parameters) > 0
    critic.learner._clear()


def test_the_reward_model_begins_as_its_reference(policy):
    frozen = Policy(copy.deepcopy(policy.model).requires_grad_(False))
    prm = scorer_of("prm", policy, frozen)
    assert {v for row in prm.scores(sequences_of(policy, "prm", lambda i, s: 1.0)) for v in row} == {0.0}


@pytest.mark.parametrize("budget", [30, 10**6])
def test_the_reward_model_s_scores_and_gradient(policy, reference, budget):
    """q against plain passes of both models, and the gradient of (1/S) Σ BCE(σ(β Σ q), label)."""
    prm = scorer_of("prm", policy, reference, micro_batch_tokens=budget)
    sequences = sequences_of(policy, "prm", lambda i, s: float(i % 2))
    tally = prm.learner.accumulate(Update(sequences=tuple(sequences), terms=(PRM,)))
    found = torch.cat([p.grad.reshape(-1) for p in prm.learner.parameters])
    prm.learner._clear()

    model, total = prm.learner.policy.model, 0.0
    for i, (sequence, row) in enumerate(zip(sequences, prm.scores(sequences), strict=True)):
        with torch.no_grad():
            ref = plain_forward(reference.model, sequence)[0]
        q = plain_forward(model, sequence)[0] - ref
        assert row == pytest.approx(q.tolist(), rel=1e-8, abs=1e-10)
        share = torch.sigmoid(0.3 * q.sum())
        total = total - (share if i % 2 else 1 - share).log() / len(sequences)
    expected = torch.cat([g.reshape(-1) for g in torch.autograd.grad(total, prm.learner.parameters)])
    assert float(expected.norm()) > 1e-3
    assert float((found - expected).norm() / expected.norm()) < 1e-9
    assert tally.losses["prm"] == pytest.approx(float(total.detach()), rel=1e-9)


def test_a_value_that_is_not_finite_is_blamed_on_its_rollout(policy):
    critic = with_head(scorer_of("critic", policy))
    sequences = sequences_of(policy, "value", lambda i, s: float("nan") if i == 2 else 0.0)
    old = tuple(map(tuple, critic.scores(sequences)))
    report = critic.learner.apply(
        Update(sequences=tuple(sequences), terms=(VALUE,), old_logprobs=old), critic.optimizer
    )
    assert not report.taken
    assert [(s.problem_id, s.what) for s in report.fault.samples] == [("p1", "target")]


def test_the_head_s_layout_is_the_policy_s():
    """A head of zeros agrees with any packing, so it must not decide."""
    padded = Policy(tiny_model(seed=1, hidden=32), layout="padded")
    assert scorer_of("critic", padded).learner.policy.layout == "padded"
    packed = scorer_of("critic", Policy(tiny_model(seed=1, hidden=32)))
    assert packed.learner.policy.layout == "packed"
    assert isinstance(packed.learner, Learner)
