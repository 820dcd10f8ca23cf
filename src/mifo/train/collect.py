"""What a turn collects: problems, rollouts of the current policy, verdicts, rewards."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mifo.config.schema import RewardConfig
from mifo.data.extract import END_OF_THOUGHT
from mifo.errors import NumericsError
from mifo.rewards import Answer, check_rewards
from mifo.train.faults import bad_rewards, bad_rollouts, check_weights
from mifo.train.starts import Start, continued, plan_requests
from mifo.types import Group, Phase, Problem, Rollout, Sampling, Verdict

if TYPE_CHECKING:
    from mifo.train.run import Parts, Run


def collect(run: Run, phase: Phase) -> tuple[Group, ...]:
    """The groups of one turn; () where the phase draws no problems, or where the rollouts are none (`run.tainted` says why).

    With `phase.resample` or `phase.retries` these are all groups of all rounds: which of them are learned from is for the method
    to say.
    """
    if phase.prompts == 0:
        return ()
    groups: tuple[Group, ...] = ()
    for number in range(1 if phase.resample is None else phase.resample.rounds):
        groups += _round(run, phase, number)
        if run.tainted is not None:
            return ()
        if phase.resample is None or sum(map(phase.resample.keeps, groups)) >= phase.resample.groups:
            break
    if phase.retries is not None:
        groups = _with_retries(run, phase, groups)
    run.tainted = run.tainted or bad_rewards(groups)
    return groups


def _round(run: Run, phase: Phase, number: int) -> tuple[Group, ...]:
    """The groups of `phase.prompts` fresh problems; () where `run.tainted` says why."""
    problems = run.stream.take(phase.prompts)
    shown = tuple(run.make_group(p, (), ()) for p in run.stream.take(phase.demonstrations))
    run.ledger.saw_problems([p.id for p in problems] + [group.problem.id for group in shown])
    if phase.rollouts == 0:
        return tuple(run.make_group(p, (), ()) for p in problems) + shown
    starts = [_start(run, p, _prefix_lengths(run, phase, p)) for p in problems]
    groups = _sample(run, starts, f"rollout.{number}" if number else "rollout")
    return () if run.tainted is not None else groups + shown


def _with_retries(run: Run, phase: Phase, groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """The groups with those that the phase wants sampled again from inside a demonstration; () where `run.tainted` says why."""
    assert phase.retries is not None
    problems = {group.problem.id: group.problem for group in groups}
    number = 0
    while wanted := phase.retries(groups):
        starts = [_start(run, problems[w.problem_id], (w.prefix_tokens,) * phase.rollouts) for w in wanted]
        groups += _sample(run, starts, f"retry.{number}")
        if run.tainted is not None:
            return ()
        number += 1
    return groups


def _prefix_lengths(run: Run, phase: Phase, problem: Problem) -> tuple[int, ...]:
    if phase.prefixes is None:
        return (0,) * phase.rollouts
    demonstration = run.parts.corpus.encoded[problem.id].demonstration_ids
    assert demonstration is not None, problem.id
    lengths = phase.prefixes(problem.id, len(demonstration))
    assert len(lengths) == phase.rollouts, lengths
    return lengths


def _start(run: Run, problem: Problem, lengths: tuple[int, ...]) -> Start:
    encoded = run.parts.corpus.encoded[problem.id]
    return Start(problem, encoded.prompt_ids, lengths, (encoded.demonstration_ids or ()) if any(lengths) else ())


def _sample(run: Run, starts: Sequence[Start], purpose: str) -> tuple[Group, ...]:
    """A group for each start; () where `run.tainted` says why. The random numbers are those of the purpose and the step."""
    problems = [start.problem for start in starts]
    with run.ledger.timed("rollout"), run.stop.window():
        run.sync_engine()
        try:
            rollouts = _generate(run, starts, purpose)
        except NumericsError as error:
            check_weights(run.learner.policy.model)
            run.tainted = bad_rollouts(error, problems)
            return ()
    with run.ledger.timed("reward"), run.stop.window():
        verdicts = _grade(run, problems, rollouts)
    return tuple(run.make_group(p, row, v) for p, row, v in zip(problems, rollouts, verdicts, strict=True))


def _generate(run: Run, starts: Sequence[Start], purpose: str) -> list[tuple[Rollout, ...]]:
    """The rollouts of each start, in its order; counted as they were sampled."""
    sampling = _sampling(run.parts)
    found: list[dict[int, Rollout]] = [{} for _ in starts]
    for number, request in enumerate(plan_requests(starts, sampling, lambda: _context(run))):
        seed = derive_seed(run.config.train.seed, f"{purpose}/{number}" if number else purpose, run.steps)
        try:
            rows = run.engine.generate(request.prompts, request.count, request.sampling, seed)
        except NumericsError as error:
            places = [(request.rows[p].start, request.rows[p].places[r]) for p, r in error.rollouts]
            raise NumericsError(str(error), places) from error
        run.ledger.prefilled_tokens += sum(map(len, request.prompts))
        run.ledger.generated_tokens += sum(len(r.token_ids) for row in rows for r in row)
        for row, rollouts in zip(request.rows, rows, strict=True):
            assert all(r.weight_version == run.version for r in rollouts), "rollouts of another version of the weights"
            for place, rollout in zip(row.places, rollouts, strict=True):
                found[row.start][place] = continued(rollout, row.prefix, sampling)
    return [tuple(row[place] for place in range(len(row))) for row in found]


def _context(run: Run) -> int:
    return int(run.learner.policy.model.config.max_position_embeddings)


def _sampling(parts: Parts) -> Sampling:
    rollout = parts.config.rollout
    return Sampling(
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        max_tokens=rollout.max_response_tokens,
        stop_ids=parts.chat.stop_ids,
        ends_text=parts.chat.ends_text,
    )


def _grade(run: Run, problems: Sequence[Problem], rollouts: Sequence[Sequence[Rollout]]) -> list[tuple[Verdict, ...]]:
    """Verdicts on whole responses: a prefix and what continues it."""
    answers = [
        Answer(grader=problem.grader, gold=problem.answer, text=run.parts.chat.decode(rollout.token_ids))
        for problem, row in zip(problems, rollouts, strict=True)
        for rollout in row
    ]
    graded = run.parts.grader.grade(answers)
    run.failures.see(answers, graded)
    if run.config.legacy.require_thought_end:
        graded = [
            v if END_OF_THOUGHT in answer.text else Verdict.WRONG for v, answer in zip(graded, answers, strict=True)
        ]
    verdicts = iter(graded)
    return [tuple(next(verdicts) for _ in row) for row in rollouts]


def make_group(parts: Parts, problem: Problem, rollouts: Sequence[Rollout], verdicts: Sequence[Verdict]) -> Group:
    """A problem of the training data with its rollouts, their verdicts, and the rewards these mean."""
    rewards = tuple(_reward(parts.config.reward, r, v) for r, v in zip(rollouts, verdicts, strict=True))
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


def _reward(reward: RewardConfig, rollout: Rollout, verdict: Verdict) -> float:
    """What a rollout earns. One that was cut off may have a reward of its own, whatever its verdict (Oat-Zero)."""
    if reward.truncated is not None and rollout.stop == "length":
        return reward.truncated
    return reward.correct if verdict is Verdict.CORRECT else reward.incorrect


def derive_seed(seed: int, purpose: str, step: int) -> int:
    """A seed for one purpose at one step; the same on every platform, so a resumed run needs no generator state."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
