"""Dynamic sampling on a scripted engine: which prompts, how many rollouts, which seeds, when it stops."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from mifo.data.stream import ProblemStream
from mifo.errors import NumericsError
from mifo.rewards import FailureWatch
from mifo.train import collect as collecting
from mifo.train.collect import collect, derive_seed
from mifo.train.ledger import Ledger
from mifo.types import Group, Message, Phase, Problem, Resample, Rollout, Verdict

PROBLEMS = [Problem(id=f"p{i}", messages=(Message("user", "?"),), answer="1") for i in range(100)]


class ScriptedRun:
    """A run whose engine answers the n-th prompt of a turn with `correct[n]` right responses."""

    def __init__(self, correct, monkeypatch, *, fail_in=None):
        self.correct, self.fail_in = iter(correct), fail_in
        self.calls, self.tainted, self.steps, self.version = [], None, 7, 3
        self.stream, self.ledger = ProblemStream(PROBLEMS, 0), Ledger(parameters=1)
        self.failures = FailureWatch(max_share=1.0, window=10)
        self.stop = SimpleNamespace(window=nullcontext)
        self.engine = self
        self.config = SimpleNamespace(train=SimpleNamespace(seed=5))
        encoded = {p.id: SimpleNamespace(prompt_ids=(1, int(p.id[1:]) + 2)) for p in PROBLEMS}
        self.parts = SimpleNamespace(corpus=SimpleNamespace(encoded=encoded))
        model = SimpleNamespace(named_parameters=list, named_buffers=list)
        self.learner = SimpleNamespace(policy=SimpleNamespace(model=model))
        monkeypatch.setattr(collecting, "_sampling", lambda parts: None)
        monkeypatch.setattr(collecting, "check_weights", lambda model: None)
        monkeypatch.setattr(collecting, "_grade", self.grade)

    def sync_engine(self):
        pass

    def generate(self, prompts, count, sampling, seed):
        if len(self.calls) == self.fail_in:
            raise NumericsError("rollouts.0.0: not finite")
        self.calls.append((prompts, count, seed))
        rollout = Rollout(token_ids=(5, 6), logprobs=(-1.0, -1.0), stop="stop", weight_version=self.version)
        return [(rollout,) * count for _ in prompts]

    def grade(self, run, problems, rollouts):
        counts = [next(self.correct) for _ in problems]
        return [
            tuple(Verdict.CORRECT if i < n else Verdict.WRONG for i in range(len(row)))
            for n, row in zip(counts, rollouts, strict=True)
        ]

    def make_group(self, problem, rollouts, verdicts):
        return Group(
            problem=problem,
            prompt_ids=self.parts.corpus.encoded[problem.id].prompt_ids,
            rollouts=rollouts,
            verdicts=verdicts,
            rewards=tuple(float(v is Verdict.CORRECT) for v in verdicts),
        )


def phase(groups=2, rounds=4, prompts=3):
    return Phase(
        name="rl", optimizer="rl", prompts=prompts, rollouts=4, resample=Resample(groups=groups, rounds=rounds)
    )


def test_it_stops_with_the_round_that_brings_enough_mixed_groups(monkeypatch):
    run = ScriptedRun([0, 4, 0, 1, 4, 0, 3, 2, 0], monkeypatch)  # one mixed group in the second round, two in the third
    groups = collect(run, phase())
    expected = [p.id for p in ProblemStream(PROBLEMS, 0).take(9)]
    assert [g.problem.id for g in groups] == expected  # fresh prompts each round, all of them returned
    assert [g.mixed for g in groups] == [False] * 3 + [True, False, False] + [True, True, False]
    assert run.stream.position == 9
    assert [count for _, count, _ in run.calls] == [4, 4, 4]
    assert [seed for *_, seed in run.calls] == [derive_seed(5, n, 7) for n in ("rollout", "rollout.1", "rollout.2")]
    assert run.ledger.generated_tokens == 9 * 4 * 2
    assert run.ledger.prefilled_tokens == 9 * 2
    assert run.ledger.problems_sampled == 9


def test_one_round_where_that_is_enough(monkeypatch):
    run = ScriptedRun([2, 0, 3], monkeypatch)
    assert len(collect(run, phase())) == 3
    assert len(run.calls) == 1


@pytest.mark.parametrize("rounds", [1, 4])
def test_the_cap_holds(monkeypatch, rounds):
    run = ScriptedRun([0, 4] * 100, monkeypatch)
    assert len(collect(run, phase(rounds=rounds))) == 3 * rounds
    assert len(run.calls) == rounds


def test_without_it_there_is_one_round_with_the_seed_there_always_was(monkeypatch):
    run = ScriptedRun([0] * 3, monkeypatch)
    assert len(collect(run, Phase(name="rl", optimizer="rl", prompts=3, rollouts=4))) == 3
    assert [seed for *_, seed in run.calls] == [derive_seed(5, "rollout", 7)]


def test_a_round_that_cannot_be_sampled_ends_the_turn(monkeypatch):
    run = ScriptedRun([0] * 6, monkeypatch, fail_in=1)
    monkeypatch.setattr(collecting, "bad_rollouts", lambda error, problems: str(error))
    assert collect(run, phase()) == ()
    assert "not finite" in run.tainted
    assert len(run.calls) == 1
