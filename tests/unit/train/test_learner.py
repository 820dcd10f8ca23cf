"""What the learner reports is what it did; what it refuses it leaves untouched."""

from dataclasses import replace

import pytest
import torch
from builders import make_sequences

from mifo.config.schema import OptimizerConfig
from mifo.core.losses import CrossEntropy, KlToReference, PolicyGradient
from mifo.train.gap import SamplerWatch
from mifo.train.learner import Learner
from mifo.train.model import tiny_model
from mifo.train.optim import ScheduledAdamW, learning_rate
from mifo.train.policy import Policy
from mifo.train.rows import live_sequences
from mifo.types import Term, Update

PG = Term(name="pg", loss=PolicyGradient(), uses_old_policy=True)


def update_of(lengths, policy, term=PG, **settings):
    sequences = make_sequences(lengths, vocabulary=policy.model.config.vocab_size, terms=[term.name], group=2)
    return Update(sequences=tuple(sequences), terms=(term,), **settings)


def test_schedule_by_hand():
    config = OptimizerConfig(
        learning_rate=1.0, warmup_updates=4, schedule="linear", decay_updates=14, minimum_ratio=0.1
    )
    assert [learning_rate(config, u) for u in (0, 1, 3, 4, 9, 14, 99)] == pytest.approx(
        [0.25, 0.5, 1, 1, 0.55, 0.1, 0.1]
    )
    cosine = OptimizerConfig(learning_rate=1.0, schedule="cosine", decay_updates=10, minimum_ratio=0.0)
    assert [learning_rate(cosine, u) for u in (0, 5, 10)] == pytest.approx([1.0, 0.5, 0.0])


def test_logged_rate_and_norm_are_those_used():
    policy = Policy(tiny_model(seed=0))
    optimizer = ScheduledAdamW(policy.parameters, OptimizerConfig(learning_rate=0.5, warmup_updates=10, clip_norm=None))
    learner = Learner(policy, micro_batch_tokens=50)
    update = update_of([5, 9, 3, 14], policy)
    tally = learner.accumulate(update)
    flat = torch.cat([p.grad.reshape(-1) for p in learner.parameters])
    learner._clear()
    report = learner.apply(update, optimizer)
    assert report.learning_rate == pytest.approx(0.05)
    assert optimizer.optimizer.param_groups[0]["lr"] == report.learning_rate
    assert report.grad_norm == pytest.approx(float(flat.norm()), rel=1e-4)
    assert report.loss == pytest.approx(sum(tally.losses.values()), rel=1e-6)
    assert (report.tokens, report.sequences, report.trained_sequences) == (31, 4, 4)
    prompts = {s.prompt_ids for s in update.sequences}
    assert report.fed_tokens == 31 - 4 + sum(map(len, prompts))


def test_sampler_gap_is_the_mean_difference():
    policy = Policy(tiny_model(seed=0))
    learner = Learner(policy, micro_batch_tokens=10**6)
    update = update_of([4, 7], policy)
    trained = learner.logprobs(update.sequences)
    gaps = [
        abs(a - b)
        for s, row in zip(update.sequences, trained, strict=True)
        for a, b in zip(s.sampler_logprobs, row, strict=True)
    ]
    report = learner.apply(update, ScheduledAdamW(policy.parameters, OptimizerConfig()))
    assert report.sampler_gap == pytest.approx(sum(gaps) / len(gaps), rel=1e-5)


def test_sampler_gap_of_a_later_update_is_that_to_the_policy_that_was_sampled():
    """After a step the weights have moved on purpose: that is no gap. The gap is measured to π_old, with nothing fed as well."""
    policy = Policy(tiny_model(seed=0))
    learner = Learner(policy, micro_batch_tokens=10**6, sampler_watch=SamplerWatch(None, torch.float32))
    sequences = update_of([6, 8], policy).sequences
    old = tuple(learner.logprobs(sequences))
    own = tuple(replace(s, sampler_logprobs=row) for s, row in zip(sequences, old, strict=True))
    optimizer = ScheduledAdamW(policy.parameters, OptimizerConfig(learning_rate=0.05))
    learner.apply(Update(sequences=own, terms=(PG,)), optimizer)
    moved = learner.logprobs(sequences)
    assert max(abs(a - b) for a, b in zip(sum(old, ()), sum(moved, ()), strict=True)) > 0.01
    assert learner.apply(Update(sequences=own, terms=(PG,), old_logprobs=old), optimizer).sampler_gap == 0.0
    flat = tuple(replace(s, weights={"pg": 0.0}) for s in sequences)
    report = learner.apply(Update(sequences=flat, terms=(PG,), old_logprobs=old), optimizer)
    gaps = [abs(a - b) for s, row in zip(flat, old, strict=True) for a, b in zip(s.sampler_logprobs, row, strict=True)]
    assert report.sampler_gap == pytest.approx(sum(gaps) / len(gaps), rel=1e-5)
    assert (report.entropy, report.clip_fraction) == (None, None)  # not 0: nothing was fed, so nothing was measured


def test_the_gap_is_measured_where_nothing_is_fed():
    """All groups all-equal: some rollouts are scored for the alarm, and their entropy is reported; nothing is trained."""
    policy = Policy(tiny_model(seed=0))
    watch = SamplerWatch(None, torch.float32)
    flat = tuple(replace(s, weights={"pg": 0.0}) for s in update_of([120, 90, 70, 60], policy).sequences)
    optimizer = ScheduledAdamW(policy.parameters, OptimizerConfig())
    blind = Learner(policy, micro_batch_tokens=10**6).apply(Update(sequences=flat, terms=(PG,)), optimizer)
    assert (blind.sampler_gap, blind.entropy, blind.clip_fraction, blind.tokens) == (None, None, None, 0)
    learner = Learner(policy, micro_batch_tokens=50, sampler_watch=watch)
    scored = learner.logprobs(flat[:3])  # 256 tokens are enough: the fourth is left alone
    report = learner.apply(Update(sequences=flat, terms=(PG,)), optimizer)
    gaps = [
        abs(a - b) for s, row in zip(flat, scored, strict=False) for a, b in zip(s.sampler_logprobs, row, strict=True)
    ]
    assert len(gaps) == 280
    assert report.sampler_gap == pytest.approx(sum(gaps) / len(gaps), rel=1e-4)
    assert report.sampler_gap > report.sampler_gap_limit == 1e-3
    assert 3.0 < report.entropy < 6.0
    assert (report.tokens, report.fed_tokens, report.trained_sequences) == (0, 0, 0)
    few = (replace(flat[0], weights={"pg": 1.0}), *flat[1:])  # 120 tokens are fed, so 136 more are wanted
    report = learner.apply(Update(sequences=few, terms=(PG,)), optimizer)
    assert report.tokens == 120
    assert report.sampler_gap is not None


def test_old_policy_of_a_later_update_is_the_one_before_any_update():
    """With π_old computed beforehand the ratio differs from 1 after a step; without it the clip could never act."""
    policy = Policy(tiny_model(seed=0))
    learner = Learner(policy, micro_batch_tokens=10**6)
    update = update_of([6, 8], policy)
    old = tuple(learner.logprobs(update.sequences))
    fresh = learner.accumulate(update)
    learner._clear()
    same = learner.accumulate(Update(sequences=update.sequences, terms=update.terms, old_logprobs=old))
    learner._clear()
    assert same.losses["pg"] == pytest.approx(fresh.losses["pg"], rel=1e-5)
    learner.apply(update, ScheduledAdamW(policy.parameters, OptimizerConfig(learning_rate=0.05)))
    moved = learner.accumulate(Update(sequences=update.sequences, terms=update.terms, old_logprobs=old))
    learner._clear()
    assert moved.clipped > 0
    again = learner.accumulate(update)
    learner._clear()
    assert again.clipped == 0
    assert again.losses["pg"] == pytest.approx(fresh.losses["pg"], rel=1e-5)


def test_logprobs_come_back_in_order_whatever_the_packing():
    policy = Policy(tiny_model(seed=0).double())
    sequences = update_of([3, 30, 1, 12, 7], policy).sequences
    whole = Learner(policy, micro_batch_tokens=10**6).logprobs(sequences)
    cut = Learner(policy, micro_batch_tokens=20).logprobs(sequences)
    assert [len(row) for row in whole] == [3, 30, 1, 12, 7]
    for a, b in zip(whole, cut, strict=True):
        assert a == pytest.approx(b, rel=1e-9)


def test_an_update_of_all_equal_groups_is_a_step_with_gradient_zero():
    """Skipping must not change what AdamW does: its momentum moves on, as it would with a gradient of zeros."""
    runs = []
    for weight in (0.0, 1e-30):
        policy = Policy(tiny_model(seed=0))
        optimizer = ScheduledAdamW(policy.parameters, OptimizerConfig(learning_rate=0.01))
        learner = Learner(policy, micro_batch_tokens=10**6)
        first = update_of([4, 5], policy)
        learner.apply(first, optimizer)
        flat = tuple(
            type(s)(problem_id="x", prompt_ids=s.prompt_ids, response_ids=s.response_ids, weights={"pg": weight})
            for s in first.sequences
        )
        report = learner.apply(Update(sequences=flat, terms=(PG,)), optimizer)
        runs.append([p.detach().clone() for p in policy.parameters])
        assert report.trained_sequences == (0 if weight == 0.0 else 2)
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


def test_kl_to_itself_is_zero_and_grows_when_the_policy_moves():
    policy, reference = Policy(tiny_model(seed=0)), Policy(tiny_model(seed=0))
    learner = Learner(policy, micro_batch_tokens=10**6, reference=reference)
    term = Term(name="kl", loss=KlToReference(), uses_reference=True)
    sequences = tuple(
        type(s)(
            problem_id="x",
            prompt_ids=s.prompt_ids,
            response_ids=s.response_ids,
            weights={"kl": 1.0, "pg": s.weights["pg"]},
        )
        for s in update_of([6, 8], policy).sequences
    )
    at_start = learner.accumulate(Update(sequences=sequences, terms=(term,))).losses["kl"]
    learner._clear()
    assert at_start == pytest.approx(0.0, abs=1e-9)
    learner.apply(
        Update(sequences=sequences, terms=(PG,)), ScheduledAdamW(policy.parameters, OptimizerConfig(learning_rate=0.01))
    )
    assert learner.accumulate(Update(sequences=sequences, terms=(term,))).losses["kl"] > 1e-4
    learner._clear()


def test_a_weight_for_each_token_is_the_gradient_of_those_weights():
    """Against the sum written out: Σ_t w_t · −log π(y_t) / Σ|y|; and a tuple of one number is that number."""
    policy = Policy(tiny_model(seed=0).double())
    learner = Learner(policy, micro_batch_tokens=25)
    term = Term(name="ce", loss=CrossEntropy())
    plain = update_of([4, 11, 6], policy, term).sequences
    weights = [tuple(0.1 * (i + 1) * (-1) ** t for t in range(len(s.response_ids))) for i, s in enumerate(plain)]

    def gradient(sequences):
        tally = learner.accumulate(Update(sequences=tuple(sequences), terms=(term,)))
        flat = torch.cat([p.grad.reshape(-1) for p in learner.parameters])
        learner._clear()
        return tally.losses["ce"], flat

    loss, found = gradient(replace(s, weights={"ce": w}) for s, w in zip(plain, weights, strict=True))
    rows = learner.logprobs(plain)
    by_hand = -sum(w * v for ws, row in zip(weights, rows, strict=True) for w, v in zip(ws, row, strict=True)) / 21
    assert loss == pytest.approx(by_hand, rel=1e-9)
    one_by_one = torch.zeros_like(found)
    for i, s in enumerate(plain):  # gradients of single tokens, weighed afterwards
        for t, weight in enumerate(weights[i]):
            only = tuple(float(place == t) for place in range(len(s.response_ids)))
            silent = [replace(o, weights={"ce": only if j == i else 0.0}) for j, o in enumerate(plain)]
            one_by_one += weight * gradient(silent)[1]
    torch.testing.assert_close(found, one_by_one, rtol=1e-9, atol=1e-14)
    uniform = gradient(replace(s, weights={"ce": (0.3,) * len(s.response_ids)}) for s in plain)[1]
    assert torch.equal(uniform, gradient(replace(s, weights={"ce": 0.3}) for s in plain)[1])


def test_weights_of_zero_for_every_token_are_not_fed():
    policy = Policy(tiny_model(seed=0))
    update = update_of([3, 5], policy)
    first, second = update.sequences
    mixed = replace(
        update,
        sequences=(replace(first, weights={"pg": (0.0,) * 3}), replace(second, weights={"pg": (0.0,) * 4 + (1.0,)})),
    )
    assert live_sequences(mixed) == [1]
