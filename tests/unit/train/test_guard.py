"""Spikes, skips in a row, and the way back: by hand, by injection, and through a checkpoint."""

import json
import random
import statistics
from dataclasses import replace

import pytest
import torch
from builders import make_sequences

from mifo.config.schema import GuardConfig, OptimizerConfig
from mifo.core.freeze import ElementFreeze
from mifo.core.losses import CrossEntropy
from mifo.errors import NumericsError
from mifo.train.faults import Fault, Sample
from mifo.train.guard import Guard, loss_spread
from mifo.train.learner import Learner
from mifo.train.model import tiny_model
from mifo.train.optim import ScheduledAdamW
from mifo.train.policy import Policy
from mifo.types import Term, Update

CE = Term(name="ce", loss=CrossEntropy())
NAMED = Sample(problem_id="q7", rollout=3, what="log-prob")
NAN = Fault(kind="not finite", reason="1 of 9 sequences have numbers that are not finite", samples=(NAMED,))


def guard_of(phase="rl", **settings):
    guard = Guard(GuardConfig(**settings))
    guard.begin(phase)
    return guard


def feed(guard, norms, losses=None):
    return [guard.judge(loss, norm) for norm, loss in zip(norms, losses or [1.0] * len(norms), strict=True)]


def test_spread_by_hand():
    assert loss_spread([1.0, 2.0, 3.0, 4.0, 100.0]) == pytest.approx(1.4826)  # |x − 3| = 2 1 0 1 97, median 1
    assert loss_spread([5.0] * 9) == pytest.approx(0.5)  # a tenth of the median
    assert loss_spread([0.0] * 9) == 1e-3
    assert loss_spread([-5.0] * 9) == pytest.approx(0.5)


def test_a_norm_of_so_many_medians_is_a_spike():
    guard = guard_of(spike_factor=4.0)
    assert feed(guard, [1.0, 2.0, 3.0, 1.0, 2.0, 3.0, 2.0, 2.0]) == [None] * 8
    assert feed(guard, [7.9]) == [None]
    [fault] = feed(guard, [8.1])
    assert (fault.kind, fault.action) == ("spike", "warn")
    assert fault.reason == "gradient norm 8.1, 4.0 times the usual 2"


def test_a_loss_far_above_its_median_is_a_spike_and_one_below_is_not():
    guard = guard_of(spike_factor=4.0)
    losses = [1.0, 1.1, 0.9, 1.0, 1.1, 0.9, 1.0, 1.0]
    feed(guard, [1.0] * 8, losses)
    assert feed(guard, [1.0] * 3, [1.39, 0.2, -5.0]) == [None] * 3
    [fault] = feed(guard, [1.0], [1.7])
    assert fault.reason == "loss 1.7, far above the usual 1"


def test_few_updates_say_nothing_and_zero_norms_do_not_count():
    guard = guard_of()
    assert feed(guard, [1.0] * 7 + [1e6]) == [None] * 8
    guard = guard_of()
    assert feed(guard, [1.0] * 7 + [0.0] * 50 + [1e6]) == [None] * 58  # all-equal steps: seven updates are known
    assert feed(guard, [1e9]) != [None]


def test_a_lasting_change_of_level_stops_being_a_spike():
    guard = guard_of(spike_window=8)
    faults = feed(guard, [1.0] * 8 + [50.0] * 12)
    flagged = [fault is not None for fault in faults]
    assert flagged == [False] * 8 + [True] * 4 + [False] * 8  # with four of each the median is in the middle


def test_the_window_is_the_last_updates_of_the_same_phase():
    """Against a slow version that keeps everything; RL and SFT have figures of their own."""
    draw = random.Random(0)
    guard = guard_of(spike_factor=3.0, spike_window=10)
    history = {"rl": [], "sft": []}
    flagged = 0
    for _ in range(600):
        phase = draw.choice(["rl", "sft"])
        guard.begin(phase)
        norm = draw.lognormvariate(0.0, 1.0) * (100.0 if phase == "sft" else 1.0)
        own = history[phase][-10:]
        expected = len(own) >= 8 and norm > 3.0 * statistics.median(own)
        assert (guard.judge(1.0, norm) is not None) == expected
        history[phase].append(norm)
        flagged += expected
    assert 20 < flagged < 200


def test_so_many_skips_in_a_row_abort_with_what_to_do():
    guard = guard_of(skips_in_a_row=3)
    for fault in (NAN, NAN, None, NAN, NAN):
        guard.count(fault)
    with pytest.raises(NumericsError) as caught:
        guard.count(NAN)
    message = str(caught.value)
    assert "3 updates of phase 'rl' in a row were skipped (guard.skips_in_a_row = 3)" in message
    for part in ("log-prob of problem q7, rollout 3", "events.jsonl", "earlier checkpoint"):
        assert part in message


def test_skips_are_counted_for_each_phase_and_warnings_are_none():
    guard = guard_of(skips_in_a_row=2)
    warning = Fault(kind="spike", reason="", action="warn")
    for phase, fault in [("rl", NAN), ("sft", NAN), ("rl", warning), ("rl", NAN)]:
        guard.begin(phase)
        guard.count(fault)
    guard.begin("sft")
    with pytest.raises(NumericsError, match="2 updates of phase 'sft'"):
        guard.count(NAN)


class Trained:
    """Ten plain updates, so that the windows are full, under a guard."""

    def __init__(self, on_spike, clip_norm=None):
        self.policy = Policy(tiny_model(seed=0, hidden=32))
        self.learner = Learner(self.policy, micro_batch_tokens=10**6)
        self.optimizer = ScheduledAdamW(
            self.policy.parameters, OptimizerConfig(learning_rate=1e-3, warmup_updates=20, clip_norm=clip_norm)
        )
        self.guard = guard_of(on_spike=on_spike)
        self.history = []
        for seed in range(10):
            self.history.append(self.bits())
            assert self.apply(self.update(seed)).fault is None

    def update(self, seed, weight=1.0):
        drawn = make_sequences([9, 14, 6], vocabulary=self.policy.model.config.vocab_size, terms=["ce"], seed=seed)
        return Update(sequences=tuple(replace(s, weights={"ce": weight}) for s in drawn), terms=(CE,))

    def apply(self, update, **options):
        return self.learner.apply(update, self.optimizer, guard=self.guard, **options)

    def bits(self):
        tensors = [*self.policy.parameters, *self.optimizer.state_tensors().values()]
        return [t.detach().numpy().tobytes() for t in tensors], self.optimizer.updates


def test_a_spike_is_flagged_within_the_step_and_taken_with_a_warning():
    trained = Trained("warn")
    before = trained.bits()
    report = trained.apply(trained.update(99, weight=100.0))
    assert (report.fault.kind, report.fault.action, report.taken, report.moved) == ("spike", "warn", True, True)
    assert "gradient norm" in report.fault.reason
    assert "loss" in report.fault.reason
    assert trained.bits() != before
    assert not trained.guard.good.held  # a copy costs memory: only a rollback needs it


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_a_spike_is_skipped_in_every_bit(clip_norm):
    """Also where clipping would have hidden it from the optimizer."""
    trained = Trained("skip", clip_norm)
    before = trained.bits()
    report = trained.apply(trained.update(99, weight=100.0))
    assert (report.fault.action, report.taken, report.moved) == ("skip", False, False)
    assert trained.bits() == before
    assert trained.apply(trained.update(11)).taken


def test_a_rollback_undoes_the_step_before_in_every_bit():
    trained = Trained("rollback")
    report = trained.apply(trained.update(99, weight=100.0))
    assert (report.fault.action, report.taken, report.moved) == ("rollback", False, True)
    assert (
        trained.bits() == trained.history[-1]
    )  # before the tenth step: parameters, moments, step counts, update counter
    report = trained.apply(trained.update(99, weight=100.0))
    assert (report.fault.action, report.moved) == ("skip", False)  # one step is undone, never two
    assert trained.bits() == trained.history[-1]
    again = trained.apply(trained.update(9))  # and the step can be taken again, to the same bits
    assert again.taken
    other = Trained("warn")
    assert trained.bits() == other.bits()


def test_a_rollback_to_before_the_first_step_leaves_an_optimizer_without_moments():
    trained = Trained("rollback")
    policy = Policy(tiny_model(seed=3, hidden=32))
    optimizer = ScheduledAdamW(policy.parameters, OptimizerConfig(learning_rate=1e-3))
    start = [p.detach().clone() for p in policy.parameters]
    learner = Learner(policy, micro_batch_tokens=10**6)
    assert learner.apply(trained.update(0), optimizer, guard=trained.guard).taken
    assert learner.apply(trained.update(1, weight=100.0), optimizer, guard=trained.guard).fault.action == "rollback"
    assert all(torch.equal(p, old) for p, old in zip(policy.parameters, start, strict=True))
    assert (optimizer.state_tensors(), optimizer.updates) == ({}, 0)


def test_a_rollback_crosses_no_change_of_phase_and_no_freeze():
    trained = Trained("rollback")
    trained.guard.begin("sft")
    assert not trained.guard.good.held
    trained.guard.begin("rl")
    nothing = {p: torch.zeros_like(p, dtype=torch.bool) for p in trained.policy.parameters}
    freeze = ElementFreeze(nothing)
    assert trained.apply(trained.update(20), freeze=freeze).taken
    before = trained.bits()
    assert trained.apply(trained.update(99, weight=100.0), freeze=freeze).fault.action == "skip"
    assert trained.bits() == before


def test_statistics_and_copy_survive_a_checkpoint():
    """A guard that is loaded from plain data and tensors decides and restores as the one that was saved."""
    trained, other = Trained("rollback"), Trained("rollback")
    trained.guard.count(NAN)
    state = json.loads(json.dumps(trained.guard.state_dict()))
    tensors = {name: tensor.clone() for name, tensor in trained.guard.good.state_tensors().items()}
    loaded = Guard(trained.guard.settings)
    loaded.load_state_dict(state, tensors)
    assert loaded.state_dict() == trained.guard.state_dict()
    other.guard = loaded
    loaded.begin("rl")
    assert other.apply(other.update(99, weight=100.0)).fault.action == "rollback"
    assert other.bits() == trained.history[-1]
    forgetful = Trained("rollback")
    forgetful.guard = Guard(trained.guard.settings)
    forgetful.guard.begin("rl")
    assert forgetful.apply(forgetful.update(99, weight=100.0)).taken  # without the statistics it is no spike
