"""Out of memory, injected: the update is done again in smaller pieces, with the same gradient and nothing left over."""

from dataclasses import replace

import pytest
import torch
from builders import make_sequences

from mifo.config.schema import OptimizerConfig
from mifo.core.losses import CrossEntropy, PolicyGradient
from mifo.errors import DeviceError
from mifo.train.gap import SamplerWatch
from mifo.train.learner import Learner
from mifo.train.memory import is_out_of_memory, smaller_budget
from mifo.train.model import tiny_model
from mifo.train.optim import ScheduledAdamW
from mifo.train.policy import Policy
from mifo.types import Term, TopEntropy, Update

CPU_MESSAGE = (
    "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
)
ERRORS = [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(CPU_MESSAGE), MemoryError()]
TERMS = (
    Term(name="pg", loss=PolicyGradient()),
    Term(name="ce", loss=CrossEntropy(), select=TopEntropy(fraction=0.3)),
)
LENGTHS = [30, 7, 25, 9, 40, 3, 18, 22]


def update_of(policy, lengths=LENGTHS):
    vocabulary = policy.model.config.vocab_size
    return Update(
        sequences=tuple(make_sequences(lengths, vocabulary=vocabulary, terms=["pg", "ce"], group=2)), terms=TERMS
    )


class RaiseInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, error):
        ctx.error = error
        return values.clone()

    @staticmethod
    def backward(ctx, grad):
        raise ctx.error


def fail(policy, monkeypatch, when, error, where="forward"):
    """Memory runs out in the forward or backward pass of those micro-batches for which `when(call, tokens)`; returns their
    sizes, in the order they were tried."""
    plain, tried = policy.token_stats, []

    def token_stats(batch):
        tried.append(batch.tokens)
        bad = when(len(tried), batch.tokens)
        if bad and where == "forward":
            raise error
        logp, entropy = plain(batch)
        return (RaiseInBackward.apply(logp, error) if bad else logp), entropy

    monkeypatch.setattr(policy, "token_stats", token_stats)
    return tried


def gradient(learner, update):
    tally = learner.accumulate(update)
    flat = torch.cat([p.grad.reshape(-1) for p in learner.parameters])
    learner._clear()
    return flat, tally


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_the_gradient_is_that_of_the_whole_update(monkeypatch, error, where):
    policy = Policy(tiny_model(seed=1, hidden=32).double())
    update = update_of(policy)
    expected, whole = gradient(Learner(policy, micro_batch_tokens=80), update)
    learner = Learner(policy, micro_batch_tokens=80)
    tried = fail(policy, monkeypatch, lambda call, tokens: call == 2, error, where)
    found, tally = gradient(learner, update)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-13)
    assert learner.micro_batch_tokens == tried[1] // 2 < 40
    assert len(tried) > 5  # the first micro-batch was done again too: what it had added was thrown away
    assert tally.loss == pytest.approx(whole.loss, rel=1e-9)
    assert (tally.tokens, tally.fed >= whole.fed) == (whole.tokens, True)


def test_in_fp32_it_is_the_same_to_a_millionth_of_its_norm(monkeypatch):
    policy = Policy(tiny_model(seed=1, hidden=32))
    update = update_of(policy)
    expected, _ = gradient(Learner(policy, micro_batch_tokens=80), update)
    tried = fail(policy, monkeypatch, lambda call, tokens: tokens > 60, ERRORS[0], "backward")
    found, _ = gradient(Learner(policy, micro_batch_tokens=10**6), update)
    assert sum(tokens > 60 for tokens in tried) >= 2  # halved twice
    assert float((found - expected).norm()) <= 1e-6 * float(expected.norm())


def test_gradients_kept_from_before_would_be_noticed(monkeypatch):
    """The comparison can fail: a learner that keeps what the failed attempt had added gives another gradient."""
    policy = Policy(tiny_model(seed=1, hidden=32).double())
    update = update_of(policy)
    expected, _ = gradient(Learner(policy, micro_batch_tokens=80), update)
    learner = Learner(policy, micro_batch_tokens=80)
    fail(policy, monkeypatch, lambda call, tokens: call == 2, ERRORS[0])
    monkeypatch.setattr(learner, "_clear", lambda: None)
    found = learner.accumulate(update)
    flat = torch.cat([p.grad.reshape(-1) for p in learner.parameters])
    assert found.tokens == sum(LENGTHS)
    assert float((flat - expected).norm()) > 1e-2 * float(expected.norm())


def test_a_step_and_its_report_are_those_of_enough_memory_and_the_budget_stays(monkeypatch):
    reports, weights = [], []
    for memory in (10**6, 60):
        policy = Policy(tiny_model(seed=1, hidden=32).double())
        learner = Learner(policy, micro_batch_tokens=200)
        optimizer = ScheduledAdamW(policy.parameters, OptimizerConfig(learning_rate=0.01))
        limit = memory
        tried = fail(policy, monkeypatch, lambda call, tokens, limit=limit: tokens > limit, ERRORS[1])
        reports.append([learner.apply(update_of(policy), optimizer) for _ in range(2)])
        weights.append(torch.cat([p.detach().reshape(-1) for p in policy.parameters]))
    assert [r.micro_batch_tokens for r in reports[0]] == [200, 200]
    budget = reports[1][0].micro_batch_tokens
    assert 30 <= budget <= 60
    assert reports[1][1].micro_batch_tokens == learner.micro_batch_tokens == budget
    assert max(tried[-len(LENGTHS) :]) <= 60  # the second update tried nothing larger
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-9, atol=1e-12)


def test_log_prob_passes_halve_too(monkeypatch):
    policy = Policy(tiny_model(seed=1, hidden=32).double())
    sequences = update_of(policy).sequences
    learner = Learner(policy, micro_batch_tokens=10**6)
    expected = learner.logprobs(sequences)
    fail(policy, monkeypatch, lambda call, tokens: tokens > 50, ERRORS[2])
    for row, same in zip(learner.logprobs(sequences), expected, strict=True):
        assert row == pytest.approx(same, rel=1e-9)
    assert learner.micro_batch_tokens <= 50


def test_measuring_the_gap_neither_loses_nor_keeps_gradients(monkeypatch):
    """Memory runs out while unfed rollouts are scored before, and rounding is measured after, the gradient is made."""
    policy = Policy(tiny_model(seed=1, hidden=32))
    update = update_of(policy)
    flat = [replace(s, weights={"pg": 0.0, "ce": 0.0}) if i else s for i, s in enumerate(update.sequences)]
    update = replace(update, sequences=tuple(flat))
    steps = []
    for memory in (10**6, 60):
        policy = Policy(tiny_model(seed=1, hidden=32))
        learner = Learner(policy, micro_batch_tokens=500, sampler_watch=SamplerWatch(None, torch.bfloat16))
        optimizer = ScheduledAdamW(policy.parameters, OptimizerConfig(learning_rate=0.01))
        limit = memory
        fail(policy, monkeypatch, lambda call, tokens, limit=limit: tokens > limit, ERRORS[0])
        report = learner.apply(update, optimizer)
        assert report.sampler_gap_limit is not None
        steps.append((report.grad_norm, torch.cat([p.detach().reshape(-1) for p in policy.parameters])))
        assert (learner.micro_batch_tokens < 500) == (memory == 60)
    assert steps[0][0] == pytest.approx(steps[1][0], rel=1e-6)
    assert steps[0][0] > 0
    torch.testing.assert_close(steps[0][1], steps[1][1], rtol=0.0, atol=1e-6)


def test_a_budget_that_can_be_halved_no_more_is_a_clear_error(monkeypatch):
    policy = Policy(tiny_model(seed=1, hidden=32))
    learner = Learner(policy, micro_batch_tokens=200)
    fail(policy, monkeypatch, lambda call, tokens: tokens > 20, ERRORS[0])
    before = [p.detach().clone() for p in policy.parameters]
    optimizer = ScheduledAdamW(policy.parameters, OptimizerConfig(learning_rate=0.01))
    with pytest.raises(
        DeviceError, match=r"single sequence of \d+ tokens.*micro_batch_tokens.*activation_checkpointing"
    ):
        learner.apply(update_of(policy), optimizer)
    assert all(torch.equal(p, old) for p, old in zip(policy.parameters, before, strict=True))
    assert optimizer.updates == 0


def test_other_errors_are_not_taken_for_it(monkeypatch):
    policy = Policy(tiny_model(seed=1, hidden=32))
    error = RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    tried = fail(policy, monkeypatch, lambda call, tokens: True, error)
    with pytest.raises(RuntimeError, match="shapes"):
        Learner(policy, micro_batch_tokens=200).accumulate(update_of(policy))
    assert len(tried) == 1
    assert not is_out_of_memory(error)
    assert not is_out_of_memory(ValueError(CPU_MESSAGE))


def test_torch_s_own_cpu_error_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_budgets_by_hand():
    assert smaller_budget(8192, 8000, 5) == 4000
    assert smaller_budget(8192, 100, 2) == 50  # what did not fit counts, not what would have been allowed
    assert smaller_budget(10, 40, 2) == 5
    assert smaller_budget(1, 3, 2) == 1  # each sequence goes alone
