"""Injected NaN and infinity: the step is skipped in every bit, and the samples behind it are named."""

from dataclasses import replace

import pytest
import torch
from builders import make_sequences

from mifo.config.schema import OptimizerConfig
from mifo.core.freeze import ElementFreeze
from mifo.core.losses import CrossEntropy, EntropyBonus, KlToReference, PolicyGradient
from mifo.errors import NumericsError
from mifo.train.faults import NAMED_IN_RECORD, Fault, Sample, bad_rewards, bad_tensors, check_weights
from mifo.train.learner import Learner
from mifo.train.model import tiny_model
from mifo.train.optim import ScheduledAdamW
from mifo.train.policy import Policy
from mifo.types import Group, Problem, Term, TopEntropy, Update, Verdict

TERMS = (
    Term(name="pg", loss=PolicyGradient(importance_cap=2.0), uses_old_policy=True, uses_sampler=True),
    Term(name="ce", loss=CrossEntropy(), coefficient=0.5, select=TopEntropy(fraction=0.5)),
    Term(name="kl", loss=KlToReference(), coefficient=0.1, uses_reference=True),
    Term(name="ent", loss=EntropyBonus(), coefficient=0.01, uses_entropy_gradient=True),
)


class Bench:
    """A learner that has taken one step, and a copy of everything that a step could change."""

    def __init__(self, *, budget=60, terms=TERMS):
        self.policy, self.reference = Policy(tiny_model(seed=0, hidden=32)), Policy(tiny_model(seed=1, hidden=32))
        self.learner = Learner(self.policy, micro_batch_tokens=budget, reference=self.reference)
        self.optimizer = ScheduledAdamW(self.policy.parameters, OptimizerConfig(learning_rate=0.01))
        drawn = make_sequences(
            [12, 7, 15, 9, 20, 3],
            vocabulary=self.policy.model.config.vocab_size,
            terms=[t.name for t in terms],
            group=2,
        )
        sequences = tuple(replace(s, rollout=i % 2) for i, s in enumerate(drawn))
        self.update = Update(sequences=sequences, terms=terms, old_logprobs=tuple(self.learner.logprobs(sequences)))
        assert self.learner.apply(self.update, self.optimizer).taken
        self.before = self.bits()

    def bits(self):
        tensors = [*self.policy.parameters, *self.optimizer.state_tensors().values()]
        return [t.detach().numpy().tobytes() for t in tensors], self.optimizer.updates

    def refused(self, update=None, **options):
        """The fault of an update, which must have left every bit as it was."""
        report = self.learner.apply(update or self.update, self.optimizer, **options)
        assert not report.taken
        assert not report.moved
        assert self.bits() == self.before
        assert all(p.grad is None for p in self.policy.parameters)
        return report.fault

    def with_sequence(self, index, **changes):
        sequences = list(self.update.sequences)
        sequences[index] = replace(sequences[index], **changes)
        return replace(self.update, sequences=tuple(sequences))


def poisoned_stats(policy, target, *, what, value):
    """`token_stats` that returns `value` for one token of the sequence whose response is `target`."""
    plain = policy.token_stats

    def token_stats(batch):
        logp, entropy = plain(batch)
        first = next(
            (i for i in range(len(batch.target_T)) if batch.target_T[i : i + len(target)].tolist() == list(target)),
            None,
        )
        if first is not None:
            hit = torch.zeros(len(logp), dtype=torch.bool)
            hit[first + 1] = True
            logp, entropy = (
                t.masked_fill(hit, value) if name == what else t
                for name, t in (("log-prob", logp), ("entropy", entropy))
            )
        return logp, entropy

    return token_stats


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("what", ["log-prob", "entropy"])
def test_a_bad_log_prob_or_entropy_is_blamed_on_its_rollout(monkeypatch, what, value):
    bench = Bench()
    target = bench.update.sequences[3]
    stats = poisoned_stats(bench.policy, target.response_ids, what=what, value=value)
    monkeypatch.setattr(bench.policy, "token_stats", stats)
    fault = bench.refused()
    assert fault.samples == (Sample(problem_id="p1", rollout=1, what=what),)
    assert fault.reason == "1 of 6 sequences have numbers that are not finite"
    assert str(fault.samples[0]) == f"{what} of problem p1, rollout 1"


def test_a_bad_reference_is_blamed_on_the_reference(monkeypatch):
    bench = Bench()
    target = bench.update.sequences[0].response_ids
    stats = poisoned_stats(bench.reference, target, what="log-prob", value=float("-inf"))
    monkeypatch.setattr(bench.reference, "token_stats", stats)
    assert bench.refused().samples == (Sample(problem_id="p0", rollout=0, what="reference log-prob"),)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("term", [t.name for t in TERMS])
def test_a_bad_weight_is_blamed_whatever_its_stream(term, value):
    """An advantage of NaN, say, from a reward that was."""
    bench = Bench()
    weights = dict(bench.update.sequences[4].weights) | {term: value}
    fault = bench.refused(bench.with_sequence(4, weights=weights))
    assert fault.samples == (Sample(problem_id="p2", rollout=0, what=f"{term} weight"),)


def test_bad_log_probs_of_sampler_and_old_policy_are_told_apart():
    bench = Bench()
    rows = list(bench.update.sequences[1].sampler_logprobs)
    rows[2] = float("nan")
    fault = bench.refused(bench.with_sequence(1, sampler_logprobs=tuple(rows)))
    assert fault.samples == (Sample(problem_id="p0", rollout=1, what="sampler log-prob"),)
    old = list(bench.update.old_logprobs)
    old[5] = (float("nan"), *old[5][1:])
    fault = bench.refused(replace(bench.update, old_logprobs=tuple(old)))
    assert fault.samples == (Sample(problem_id="p2", rollout=1, what="old log-prob"),)


def test_all_culprits_are_named_across_micro_batches():
    bench = Bench()
    update = bench.with_sequence(0, weights={"pg": float("nan")})
    demonstration = replace(update.sequences[4], rollout=None, weights={"ce": float("inf")})
    update = replace(update, sequences=(*update.sequences[:4], demonstration, update.sequences[5]))
    fault = bench.refused(update)
    assert [(s.problem_id, s.rollout, s.what) for s in fault.samples] == [
        ("p0", 0, "pg weight"),
        ("p2", None, "ce weight"),
    ]
    assert fault.record()["sample_count"] == 2
    assert fault.record()["samples"][1] == {"problem": "p2", "rollout": None, "what": "ce weight"}
    many = Fault(kind="not finite", reason="", samples=fault.samples * 100)
    assert (many.record()["sample_count"], len(many.record()["samples"])) == (200, NAMED_IN_RECORD)


def test_a_sum_that_overflows_names_its_micro_batch():
    """Every token is finite in fp32, their sum is not."""
    bench = Bench(budget=10**6, terms=(Term(name="ce", loss=CrossEntropy(), normalizer="constant", constant_tokens=1),))
    sequences = tuple(replace(s, weights={"ce": 3e37}) for s in bench.update.sequences)
    fault = bench.refused(replace(bench.update, sequences=sequences))
    assert {s.what for s in fault.samples} == {"sum of losses"}
    assert len(fault.samples) == 6


def steep(stats):
    """Value 0 everywhere; an infinite slope on sequences of weight 7."""
    hit = stats.weight_T == 7.0
    values = stats.logp_T * 0.0
    return values.index_put((hit.nonzero()[:, 0],), torch.sqrt((stats.logp_T - stats.logp_T.detach())[hit]))


def test_a_gradient_that_is_not_finite_names_its_micro_batch():
    terms = (Term(name="steep", loss=steep),)
    bench = Bench(terms=terms)
    update = bench.with_sequence(3, weights={"steep": 7.0})
    assert bench.learner.accumulate(update).loss == 0.0  # the losses show nothing
    fault = bench.refused(update)
    assert fault.reason.startswith("the gradient norm is ")
    named = {(s.problem_id, s.rollout) for s in fault.samples}
    assert ("p1", 1) in named
    assert len(named) < 6
    nothing = {p: torch.zeros_like(p, dtype=torch.bool) for p in bench.policy.parameters}
    whole = bench.refused(update, freeze=ElementFreeze(nothing))
    assert {(s.problem_id, s.rollout) for s in whole.samples} == named


def test_a_norm_that_overflows_though_no_element_does_names_the_largest_micro_batch():
    terms = (Term(name="ce", loss=CrossEntropy(), normalizer="constant", constant_tokens=1),)
    bench = Bench(terms=terms, budget=30)
    sequences = tuple(replace(s, weights={"ce": 1e25 if s.problem_id == "p2" else 1.0}) for s in bench.update.sequences)
    fault = bench.refused(replace(bench.update, sequences=sequences))
    assert fault.reason == "the gradient norm is inf"
    assert {s.problem_id for s in fault.samples} == {"p2"}
    # and where no micro-batch overflows alone: the same sequence twice, each of 1.2e19, the second a little larger
    one = replace(bench.update.sequences[0], weights={"ce": 1.0})
    bench.learner.accumulate(replace(bench.update, sequences=(one,), old_logprobs=None))
    weight = 2 * 1.2e19 / bench.learner._clip(None)
    pair = tuple(replace(one, problem_id=n, weights={"ce": w * weight}) for n, w in (("first", 1.0), ("second", 1.1)))
    bench.learner.micro_batch_tokens = 1
    fault = bench.refused(replace(bench.update, sequences=pair, old_logprobs=None))
    assert [s.problem_id for s in fault.samples] == ["second"]


def test_a_bad_element_that_is_frozen_anyway_stops_nobody():
    """Gradients of masked elements are cleared before the norm is taken: what may not move cannot do harm."""
    bench = Bench()
    everything = {p: torch.ones_like(p, dtype=torch.bool) for p in bench.policy.parameters}
    report = bench.learner.apply(bench.update, bench.optimizer, freeze=ElementFreeze(everything))
    assert report.taken
    assert report.grad_norm == 0.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bad_weights_abort_and_are_named(value):
    bench = Bench()
    name, parameter = list(bench.policy.model.named_parameters())[3]
    with torch.no_grad():
        parameter.view(-1)[5] = value
    bench.before = bench.bits()
    with pytest.raises(NumericsError, match=rf"weights that are NaN or infinite: {name}\. .*earlier checkpoint"):
        bench.learner.apply(bench.update, bench.optimizer)
    assert bench.bits() == bench.before
    assert all(p.grad is None for p in bench.policy.parameters)


def test_bad_weights_are_refused_when_a_model_is_loaded():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    with pytest.raises(NumericsError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        Policy(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_bad_tensors_are_found_wherever_the_value_is(dtype, value):
    for place in (0, 511, 1022):
        tensor = torch.randn(1023).to(dtype)
        tensor[place] = value
        named = [("good", torch.randn(7)), ("bad", tensor), ("empty", torch.empty(0)), ("count", torch.tensor(3))]
        assert bad_tensors(named) == ["bad"]


def test_finite_weights_pass_and_many_bad_ones_are_counted():
    model = tiny_model()
    check_weights(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.view(-1)[0] = float("inf")
    with pytest.raises(NumericsError, match=r"and \d+ more"):
        check_weights(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_bad_rewards_are_found(value):
    def group(name, rewards):
        verdicts = (Verdict.WRONG,) * len(rewards)
        problem = Problem(id=name, messages=(), answer="")
        return Group(problem=problem, prompt_ids=(1,), rollouts=(), verdicts=verdicts, rewards=rewards)

    fault = bad_rewards([group("a", (0.0, 1.0)), group("b", (1.0, value)), group("c", (value, value))])
    assert [(s.problem_id, s.rollout) for s in fault.samples] == [("b", 1), ("c", 0), ("c", 1)]
    assert fault.reason == "3 rewards are not finite"
    assert bad_rewards([group("a", (0.0, -1e300))]) is None


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("bad_at", [0, 1, 2])
def test_a_skipped_step_in_a_frozen_phase_leaves_no_trace(bad_at, weight_decay):
    """Masked gradients and no step after them: the phase goes on as if the update had never been there."""

    def phase(with_bad):
        bench = Bench()
        bench.optimizer.optimizer.param_groups[0]["weight_decay"] = weight_decay
        draw = torch.Generator().manual_seed(0)
        masks = {p: torch.rand(p.shape, generator=draw) < 0.5 for p in bench.policy.parameters}
        frozen = [p.detach()[masks[p]].clone() for p in bench.policy.parameters]
        freeze = ElementFreeze(masks)
        bad = bench.with_sequence(0, weights={"pg": float("nan")})
        for step in range(3):
            if with_bad and step == bad_at:
                assert not bench.learner.apply(bad, bench.optimizer, freeze=freeze).taken
            assert bench.learner.apply(bench.update, bench.optimizer, freeze=freeze).taken
        freeze.settle()
        for parameter, before in zip(bench.policy.parameters, frozen, strict=True):
            assert torch.equal(parameter.detach()[masks[parameter]], before)
        return bench.bits()

    assert phase(True) == phase(False)
