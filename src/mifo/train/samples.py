"""Which rollouts of a step are written to samples.jsonl, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mifo.types import Group, TokenIds

Place = tuple[Group, int]


def sample_records(groups: Sequence[Group], wanted: int, decode: Callable[[TokenIds], str]) -> Iterator[dict[str, Any]]:
    """Some rollouts of a step as plain data, in its order: see `chosen_places`."""
    for group, i in chosen_places(groups, wanted):
        rollout = group.rollouts[i]
        yield {
            "problem": group.problem.id,
            "prompt": group.problem.messages[-1].content,
            "response": decode(rollout.token_ids),
            "answer": group.problem.answer,
            "verdict": group.verdicts[i].value,
            "tokens": len(rollout.token_ids),
            "prefix_tokens": rollout.prefix_tokens,
            "stop": rollout.stop,
        }


def chosen_places(groups: Sequence[Group], wanted: int) -> list[Place]:
    """`wanted` rollouts of a step, spread evenly over it, none for 0; of both kinds, with and without a prefix, at least one.

    An even spread alone would meet the same place of every group where groups are as large as its stride, and so miss the one
    rollout of a group that begins inside its demonstration, or see nothing else.
    """
    places = [(group, i) for group in groups for i in range(len(group.rollouts))]
    if not wanted or not places:
        return []
    chosen = list(range(len(places)))[:: max(1, len(places) // wanted)][:wanted]
    kinds = [group.rollouts[i].prefix_tokens > 0 for group, i in places]
    for kind in sorted(set(kinds) - {kinds[at] for at in chosen}):
        alike = [at for at, other in enumerate(kinds) if other == kind]
        if len(chosen) > 1:
            chosen.pop()  # all that were chosen are of the other kind
        chosen.append(alike[len(alike) // 2])
    return [places[at] for at in sorted(chosen)]
