"""What methods share whose rollouts are scored by a second model, which learns from them: PPO's critic, PRIME's reward model."""

from __future__ import annotations

from collections.abc import Sequence

from mifo.types import Group
from mifo.types import Sequence as TrainingSequence


def rollouts_of(groups: Sequence[Group]) -> list[TrainingSequence]:
    """Every rollout as a sequence without a weight in any term, in order.

    It brings no log-probs of the sampler: nothing that scores is compared with it.
    """
    return [
        TrainingSequence(
            problem_id=group.problem.id,
            prompt_ids=group.prompt_ids,
            response_ids=rollout.token_ids,
            weights={},
            rollout=index,
        )
        for group in groups
        for index, rollout in enumerate(group.rollouts)
    ]


def scores_of(group: Group) -> tuple[tuple[float, ...], ...]:
    """The scores of a group's rollouts, which the engine has made by now."""
    assert group.scores is not None
    return group.scores


def split(count: int, updates: int) -> list[slice]:
    """`count` sequences in order for so many updates, sizes differing by one at most; fewer where there are fewer sequences."""
    parts = min(count, updates)
    return [slice(i * count // parts, (i + 1) * count // parts) for i in range(parts)]
