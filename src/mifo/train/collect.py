"""What a turn collects: problems, rollouts of the current policy, verdicts, rewards."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mifo.errors import NumericsError
from mifo.rewards import Answer, check_rewards
from mifo.train.faults import bad_rewards, bad_rollouts, check_weights
from mifo.types import Group, Phase, Problem, Rollout, Sampling, Verdict

if TYPE_CHECKING:
    from mifo.train.run import Parts, Run


def collect(run: Run, phase: Phase) -> tuple[Group, ...]:
    """The groups of one turn; () where the phase draws no problems, or where the rollouts are none (`run.tainted` says why).

    With `phase.resample` these are all groups of all rounds: which of them are learned from is for the method to say.
    """
    if phase.prompts == 0:
        return ()
    groups: tuple[Group, ...] = ()
    for number in range(1 if phase.resample is None else phase.resample.rounds):
        groups += _round(run, phase, number)
        if run.tainted is not None:
            return ()
        if phase.resample is None or sum(group.mixed for group in groups) >= phase.resample.groups:
            break
    run.tainted = bad_rewards(groups)
    return groups


def _round(run: Run, phase: Phase, number: int) -> tuple[Group, ...]:
    """The groups of `phase.prompts` fresh problems; () where `run.tainted` says why."""
    parts, ledger = run.parts, run.ledger
    problems = run.stream.take(phase.prompts)
    shown = tuple(run.make_group(p, (), ()) for p in run.stream.take(phase.demonstrations))
    ledger.saw_problems([p.id for p in problems] + [group.problem.id for group in shown])
    if phase.rollouts == 0:
        return tuple(run.make_group(p, (), ()) for p in problems) + shown
    prompts = [parts.corpus.encoded[p.id].prompt_ids for p in problems]
    seed = derive_seed(run.config.train.seed, f"rollout.{number}" if number else "rollout", run.steps)
    with ledger.timed("rollout"), run.stop.window():
        run.sync_engine()
        try:
            rollouts = run.engine.generate(prompts, phase.rollouts, _sampling(parts), seed)
        except NumericsError as error:
            check_weights(run.learner.policy.model)
            run.tainted = bad_rollouts(error, problems)
            return ()
    ledger.prefilled_tokens += sum(map(len, prompts))
    ledger.generated_tokens += sum(len(r.token_ids) for row in rollouts for r in row)
    for row in rollouts:
        assert all(r.weight_version == run.version for r in row), "rollouts of another version of the weights"
    with ledger.timed("reward"), run.stop.window():
        verdicts = _grade(run, problems, rollouts)
    return tuple(run.make_group(p, row, v) for p, row, v in zip(problems, rollouts, verdicts, strict=True)) + shown


def _sampling(parts: Parts) -> Sampling:
    rollout = parts.config.rollout
    return Sampling(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        max_tokens=rollout.max_response_tokens,
        stop_ids=parts.chat.stop_ids,
    )


def _grade(run: Run, problems: Sequence[Problem], rollouts: Sequence[Sequence[Rollout]]) -> list[tuple[Verdict, ...]]:
    answers = [
        Answer(grader=problem.grader, gold=problem.answer, text=run.parts.chat.decode(rollout.token_ids))
        for problem, row in zip(problems, rollouts, strict=True)
        for rollout in row
    ]
    graded = run.parts.grader.grade(answers)
    run.failures.see(answers, graded)
    verdicts = iter(graded)
    return [tuple(next(verdicts) for _ in row) for row in rollouts]


def make_group(parts: Parts, problem: Problem, rollouts: Sequence[Rollout], verdicts: Sequence[Verdict]) -> Group:
    """A problem of the training data with its rollouts, their verdicts, and the rewards these mean."""
    reward = parts.config.reward
    rewards = tuple(reward.correct if v is Verdict.CORRECT else reward.incorrect for v in verdicts)
    check_rewards(rewards, problem.id)
    encoded = parts.corpus.encoded[problem.id]
    return Group(
        problem=problem,
        prompt_ids=encoded.prompt_ids,
        rollouts=tuple(rollouts),
        verdicts=tuple(verdicts),
        rewards=rewards,
        demonstration_ids=encoded.demonstration_ids,
    )


def derive_seed(seed: int, purpose: str, step: int) -> int:
    """A seed for one purpose at one step; the same on every platform, so a resumed run needs no generator state."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
