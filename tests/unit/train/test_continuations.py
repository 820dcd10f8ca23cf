"""Rollouts that continue a demonstration, on a scripted engine: prompts, prefixes, calls, lengths, verdicts, ledger, retries."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from mifo.data.stream import ProblemStream
from mifo.errors import NumericsError
from mifo.rewards import FailureWatch
from mifo.train import collect as collecting
from mifo.train.collect import collect, derive_seed
from mifo.train.ledger import Ledger
from mifo.train.starts import Start, continued, plan_requests
from mifo.types import Group, Message, Phase, Problem, Retry, Rollout, Sampling, Verdict

LONGEST = 8
PROBLEMS = [Problem(id=f"p{i}", messages=(Message("user", "?"),), answer="1") for i in range(4)]
DEMONSTRATION = (101, 102, 103, 104, 105, 9)


class ScriptedRun:
    """A run whose engine answers every prompt with tokens 50, 51, …, as many as `lengths` says in turn (or all it may)."""

    def __init__(self, monkeypatch, *, correct=lambda text: False, lengths=(), context=1000, fail=None):
        self.correct, self.lengths, self.fail = correct, iter(lengths), fail
        self.calls, self.graded, self.tainted, self.steps, self.version = [], [], None, 7, 3
        self.stream, self.ledger = ProblemStream(PROBLEMS, 0), Ledger(parameters=1)
        self.failures = FailureWatch(max_share=1.0, window=10)
        self.stop = SimpleNamespace(window=nullcontext)
        self.engine = self
        legacy = SimpleNamespace(require_thought_end=False)
        self.config = SimpleNamespace(train=SimpleNamespace(seed=5), legacy=legacy)
        encoded = {
            p.id: SimpleNamespace(prompt_ids=(1, int(p.id[1:]) + 2), demonstration_ids=DEMONSTRATION) for p in PROBLEMS
        }
        chat = SimpleNamespace(decode=lambda ids: ids)
        self.parts = SimpleNamespace(corpus=SimpleNamespace(encoded=encoded), chat=chat, grader=self)
        model = SimpleNamespace(
            named_parameters=list, named_buffers=list, config=SimpleNamespace(max_position_embeddings=context)
        )
        self.learner = SimpleNamespace(policy=SimpleNamespace(model=model))
        sampling = Sampling(max_tokens=LONGEST, stop_ids=(9,))
        monkeypatch.setattr(collecting, "_sampling", lambda parts: sampling)
        monkeypatch.setattr(collecting, "check_weights", lambda model: None)
        monkeypatch.setattr(self.failures, "see", lambda answers, graded: None)

    def sync_engine(self):
        pass

    def generate(self, prompts, count, sampling, seed):
        if len(self.calls) == self.fail:
            raise NumericsError("not finite", [(1, 0)])
        self.calls.append((list(prompts), count, sampling.max_tokens, seed))
        return [tuple(self.rollout(sampling) for _ in range(count)) for _ in prompts]

    def rollout(self, sampling):
        scripted = next(self.lengths, None)
        length = sampling.max_tokens if scripted is None else scripted
        return Rollout(
            token_ids=tuple(range(50, 50 + length)),
            logprobs=tuple(-float(i) for i in range(length)),
            stop="length" if scripted is None else "stop",
            weight_version=self.version,
        )

    def grade(self, answers):
        self.graded += [a.text for a in answers]
        return [Verdict.CORRECT if self.correct(a.text) else Verdict.WRONG for a in answers]

    def make_group(self, problem, rollouts, verdicts):
        encoded = self.parts.corpus.encoded[problem.id]
        return Group(
            problem=problem,
            prompt_ids=encoded.prompt_ids,
            rollouts=tuple(rollouts),
            verdicts=tuple(verdicts),
            rewards=tuple(float(v is Verdict.CORRECT) for v in verdicts),
            demonstration_ids=encoded.demonstration_ids,
        )


def phase(rollouts=3, prompts=2, **rules):
    return Phase(name="mixed", optimizer="rl", prompts=prompts, rollouts=rollouts, **rules)


def drawn(count=2):
    return [p.id for p in ProblemStream(PROBLEMS, 0).take(count)]


def prompt_of(name):
    return (1, int(name[1:]) + 2)


def test_one_of_three_begins_inside_the_demonstration(monkeypatch):
    run = ScriptedRun(monkeypatch)
    asked = []

    def rule(problem_id, tokens):
        asked.append((problem_id, tokens))
        return (0, 0, 2 if problem_id == drawn()[0] else 5)

    groups = collect(run, phase(prefixes=rule))
    first, second = drawn()
    assert asked == [(first, 6), (second, 6)]
    plain, hybrids = run.calls
    assert plain == ([prompt_of(first), prompt_of(second)], 2, 8, derive_seed(5, "rollout", 7))
    prompts = [prompt_of(first) + DEMONSTRATION[:2], prompt_of(second) + DEMONSTRATION[:5]]
    assert hybrids == (prompts, 1, 6, derive_seed(5, "rollout/1", 7))
    [group, other] = groups
    assert [r.prefix_tokens for r in group.rollouts] == [0, 0, 2]
    assert group.rollouts[2].token_ids == (101, 102, 50, 51, 52, 53, 54, 55)
    assert group.rollouts[2].logprobs == (0.0, -1.0, -2.0, -3.0, -4.0, -5.0)
    assert other.rollouts[2].token_ids == (101, 102, 103, 104, 105, 50, 51, 52)  # cut to the longest response
    assert len(other.rollouts[2].logprobs) == 3
    assert other.rollouts[2].stop == "length"
    assert run.graded == [r.token_ids for g in groups for r in g.rollouts]  # prefix and continuation together
    assert run.ledger.generated_tokens == 4 * 8 + 6 + 6  # what was sampled, cut off or not
    assert run.ledger.prefilled_tokens == 2 + 2 + 4 + 7


def test_what_ends_within_the_longest_response_has_ended(monkeypatch):
    run = ScriptedRun(monkeypatch, lengths=[3, 4])
    [first, second] = collect(run, phase(rollouts=1, prefixes=lambda name, tokens: (5 if name == drawn()[0] else 4,)))
    assert first.rollouts[0].stop == second.rollouts[0].stop == "stop"
    assert [len(g.rollouts[0].token_ids) for g in (first, second)] == [8, 8]


def test_groups_of_one_length_go_together_whatever_the_length(monkeypatch):
    """Rollouts of a group that begin alike are one prompt, which is read once."""
    run = ScriptedRun(monkeypatch)
    groups = collect(run, phase(prefixes=lambda name, tokens: (0 if name == drawn()[0] else 4,) * 3))
    [(prompts, count, longest, seed)] = run.calls
    assert (prompts, count, longest) == ([prompt_of(drawn()[0]), prompt_of(drawn()[1]) + DEMONSTRATION[:4]], 3, 8)
    assert seed == derive_seed(5, "rollout", 7)
    assert [[r.prefix_tokens for r in g.rollouts] for g in groups] == [[0] * 3, [4] * 3]
    assert {len(r.token_ids) for r in groups[1].rollouts} == {8}


@pytest.mark.parametrize(("context", "calls"), [(10, 3), (11, 2), (12, 2), (15, 1), (1000, 1)])
def test_no_request_leaves_the_context(context, calls):
    """Prompts of 2 and a longest response of 8 fit 10 positions; prefixes of 0, 1 and 5 leave 0 to 5 of them too few."""
    starts = [Start(p, (1, 2), (n,), DEMONSTRATION) for p, n in zip(PROBLEMS, (5, 0, 1), strict=False)]
    requests = plan_requests(starts, Sampling(max_tokens=8), lambda: context)
    assert len(requests) == calls
    assert sorted(row.start for r in requests for row in r.rows) == [0, 1, 2]
    for request in requests:
        assert all(len(prompt) + request.sampling.max_tokens <= context for prompt in request.prompts)
        for row in request.rows:  # and each may be as long as it is allowed to be
            assert request.sampling.max_tokens >= 8 - len(row.prefix)


def test_a_continuation_is_cut_where_the_response_is_full():
    rollout = Rollout(token_ids=(1, 2, 3), logprobs=(-1.0, -2.0, -3.0), stop="stop", weight_version=0)
    whole = continued(rollout, (7, 8), Sampling(max_tokens=4))
    assert (whole.token_ids, whole.logprobs, whole.stop, whole.prefix_tokens) == (
        (7, 8, 1, 2),
        (-1.0, -2.0),
        "length",
        2,
    )
    assert continued(rollout, (7, 8), Sampling(max_tokens=5)).stop == "stop"
    assert continued(rollout, (), Sampling(max_tokens=2)) is rollout


@pytest.mark.parametrize("length", [6, 8])
def test_a_prefix_that_leaves_nothing_to_sample_is_a_broken_rule(monkeypatch, length):
    with pytest.raises(AssertionError, match="leaves something to sample"):
        collect(ScriptedRun(monkeypatch), phase(rollouts=1, prefixes=lambda name, tokens: (length,)))


def test_rollouts_that_are_not_finite_are_named_by_their_place_in_the_group(monkeypatch):
    run = ScriptedRun(monkeypatch, fail=1)
    assert collect(run, phase(prefixes=lambda name, tokens: (0, 0, 3))) == ()
    [sample] = run.tainted.samples
    assert (sample.problem_id, sample.rollout) == (drawn()[1], 2)


def test_retries_follow_from_the_groups_so_far(monkeypatch):
    """One problem is asked for twice more, the other once; each time the rule sees everything before."""
    first, second = drawn()
    seen = []
    answers = [
        (Retry(problem_id=first, prefix_tokens=2), Retry(problem_id=second, prefix_tokens=4)),
        (Retry(problem_id=first, prefix_tokens=3),),
        (),
    ]

    def rule(groups):
        seen.append([(g.problem.id, g.rollouts[0].prefix_tokens, g.accuracy) for g in groups])
        return answers[len(seen) - 1]

    run = ScriptedRun(monkeypatch, correct=lambda ids: 103 in ids)
    groups = collect(run, phase(retries=rule))
    expected = [(first, 0, 0.0), (second, 0, 0.0), (first, 2, 0.0), (second, 4, 1.0), (first, 3, 1.0)]
    assert seen == [expected[:2], expected[:4], expected]
    assert [g.problem.id for g in groups] == [name for name, *_ in expected]
    assert [seed for *_, seed in run.calls] == [derive_seed(5, n, 7) for n in ("rollout", "retry.0", "retry.1")]
    assert [count for _, count, *_ in run.calls] == [3, 3, 3]
    assert run.stream.position == run.ledger.problems_sampled == 2  # no further questions
    assert run.ledger.prefilled_tokens == 2 * 2 + (4 + 6) + 5


def test_a_retry_that_cannot_be_sampled_ends_the_turn(monkeypatch):
    run = ScriptedRun(monkeypatch, fail=1)
    rule = lambda groups: tuple(Retry(problem_id=g.problem.id, prefix_tokens=2) for g in groups)  # noqa: E731
    assert collect(run, phase(retries=rule)) == ()
    assert run.tainted.samples[0].problem_id == drawn()[1]
