"""A second model in a turn: it scores the rollouts, and learns from them after that or before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mifo.methods.scored import rollouts_of
from mifo.train.tally import UpdateReport
from mifo.types import Group, Phase, Verdict

if TYPE_CHECKING:
    from mifo.train.run import Run
    from mifo.train.scorer import Scorer


def score(run: Run, phase: Phase) -> tuple[Group, ...]:
    """The groups of the turn with their scores; () where they cannot be learned from (`run.tainted` says why).

    Everything done is part of the turn: a run stopped here goes on with the updates that are still to be made.

    Raises:
        NumericsError: too many updates of the scorer in a row were skipped.
    """
    turn, scorer = run.turn, run.parts.scorer
    assert turn is not None
    assert scorer is not None, "the phase asks for a scorer that the method does not name"
    if run.tainted is not None:
        return ()
    with run.ledger.timed(scorer.name):
        if phase.scorer_learns == "before":
            _teach(run, scorer, phase)
        if not turn.scored:
            with run.stop.window():
                turn.groups = with_scores(scorer, turn.groups)
            turn.scored = True
            run.mark()
        if phase.scorer_learns == "after":
            _teach(run, scorer, phase)
    return turn.groups


def with_scores(scorer: Scorer, groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """The groups with a number for every token of every rollout."""
    rows = iter(scorer.scores(rollouts_of(groups)))
    return tuple(replace(group, scores=tuple(next(rows) for _ in group.rollouts)) for group in groups)


def fed_tokens(groups: tuple[Group, ...]) -> int:
    """Tokens of one pass over the rollouts of the groups, prompts once a group."""
    return sum(
        len(group.prompt_ids) + sum(len(rollout.token_ids) - 1 for rollout in group.rollouts)
        for group in groups
        if group.rollouts
    )


def scorer_metrics(groups: Sequence[Group], lessons: Sequence[UpdateReport]) -> dict[str, Any]:
    """What the second model did in a turn: mean score a token of right and of wrong rollouts, and its updates."""
    means: dict[bool, list[float]] = {True: [], False: []}
    for group in groups:
        for row, verdict in zip(group.scores or (), group.verdicts, strict=False):
            if row:
                means[verdict is Verdict.CORRECT].append(sum(row) / len(row))
    names = ("loss", "grad_norm", "learning_rate", "sequences", "tokens", "fed_tokens", "taken")
    return {
        "score_right": sum(means[True]) / len(means[True]) if means[True] else None,
        "score_wrong": sum(means[False]) / len(means[False]) if means[False] else None,
        "updates": [{name: getattr(report, name) for name in names} for report in lessons],
    }


def _teach(run: Run, scorer: Scorer, phase: Phase) -> None:
    """The scorer's updates of this turn that were not made yet."""
    turn, budget = run.turn, scorer.learner.micro_batch_tokens
    assert turn is not None
    scorer.guard.begin(scorer.name)
    updates = run.method.scorer_updates(phase, turn.groups)
    for update in updates[len(turn.lessons) :]:
        report = scorer.learner.apply(update, scorer.optimizer, guard=scorer.guard)
        turn.lessons.append(report)
        run.heed(scorer.name, scorer.guard, report.fault)
        budget = run.heed_budget(scorer.learner, budget)
        run.mark()
