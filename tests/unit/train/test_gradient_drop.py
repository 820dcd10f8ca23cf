"""Online gradient drop in an update: after accumulation, before clipping, and the same whatever the micro-batches."""

import torch
from builders import make_sequences

from mifo.config.schema import OptimizerConfig
from mifo.core.freeze import ElementFreeze
from mifo.core.losses import CrossEntropy
from mifo.core.surgery import GradientDrop, keep_mask
from mifo.train.learner import Learner
from mifo.train.model import tiny_model
from mifo.train.optim import ScheduledAdamW
from mifo.train.policy import Policy
from mifo.types import Term, Update

RATE = 0.4


def setting(drop, budget=10**6, clip=None):
    policy = Policy(tiny_model(seed=0))
    sequences = make_sequences([5, 9, 3, 14], vocabulary=policy.model.config.vocab_size, terms=["ce"])
    update = Update(sequences=tuple(sequences), terms=(Term(name="ce", loss=CrossEntropy()),))
    learner = Learner(policy, micro_batch_tokens=budget, gradient_drop=drop)
    return learner, update, ScheduledAdamW(policy.parameters, OptimizerConfig(learning_rate=1e-2, clip_norm=clip))


def masks_of(learner, step):
    return {n: keep_mask(p.shape, RATE, seed=7, step=step, name=n) for n, p in learner.policy.model.named_parameters()}


def test_the_step_is_that_of_the_masked_gradient_without_rescaling():
    learner, update, optimizer = setting(GradientDrop(RATE, 7))
    plain, _, other = setting(None)
    masks = masks_of(learner, 3)
    plain.accumulate(update)
    for name, parameter in plain.policy.model.named_parameters():
        parameter.grad *= masks[name]
    norm = float(torch.nn.utils.get_total_norm([p.grad for p in plain.parameters]))
    other.optimizer.step()
    report = learner.apply(update, optimizer, step=3)
    assert abs(report.grad_norm - norm) < 1e-6 * norm  # the clipped norm is that of what is left
    for ours, theirs in zip(learner.parameters, plain.parameters, strict=True):
        assert torch.equal(ours, theirs)


def test_micro_batches_do_not_change_the_mask():
    weights = []
    for budget in (10**6, 20):
        learner, update, optimizer = setting(GradientDrop(RATE, 7), budget)
        learner.apply(update, optimizer, step=1)
        moved = [m["exp_avg"] != 0 for m in optimizer.optimizer.state.values()]
        weights.append(moved)
    for one, other, keep in zip(*weights, masks_of(learner, 1).values(), strict=True):
        assert not (one & ~keep).any()  # a mask for each micro-batch would leave few zeros in the sum
        assert not (other & ~keep).any()


def test_every_step_has_its_own_mask():
    learner, update, optimizer = setting(GradientDrop(RATE, 7))
    learner.apply(update, optimizer, step=0)
    first = [m["exp_avg"] != 0 for m in optimizer.optimizer.state.values()]
    learner.apply(update, optimizer, step=1)
    second = [m["exp_avg"] != 0 for m in optimizer.optimizer.state.values()]
    assert any((b & ~a).any() for a, b in zip(first, second, strict=True))


def test_with_frozen_elements_both_hold():
    learner, update, optimizer = setting(GradientDrop(RATE, 7), clip=0.5)
    frozen = {p: torch.zeros_like(p, dtype=torch.bool) for p in learner.parameters}
    first = learner.parameters[0]
    frozen[first][::2] = True
    before = first.detach().clone()
    with ElementFreeze(frozen) as freeze:
        learner.apply(update, optimizer, freeze=freeze, step=0)
    assert torch.equal(first[::2], before[::2])
    assert not torch.equal(first[1::2], before[1::2])
