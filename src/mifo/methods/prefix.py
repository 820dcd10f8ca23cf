"""What methods share whose rollouts begin inside a demonstration: where a prefix may end, and as what it enters an update."""

from __future__ import annotations

from dataclasses import replace

from mifo.types import Demonstration, Group, Sequence, Update


def longest_prefix(demonstration_tokens: int, longest_response: int) -> int:
    """Most tokens of a prefix: the demonstration's end token, and one token of the longest response, are left to sample."""
    return min(demonstration_tokens, longest_response) - 1


def prefix_of_parts(part: int, parts: int, demonstration_tokens: int, longest_response: int) -> int:
    """Tokens of the first `part` of `parts` even pieces of a demonstration without its end token, as far as a prefix may go."""
    tokens = demonstration_tokens - 1
    return min(round(part * tokens / parts), longest_prefix(demonstration_tokens, longest_response))


def as_hints(update: Update) -> Update:
    """The update with every prefix at the end of its prompt: it is read, and no stream sees it."""
    return replace(update, sequences=tuple(_as_hint(s) for s in update.sequences))


def _as_hint(sequence: Sequence) -> Sequence:
    length = sequence.prefix_tokens
    if length == 0:
        return sequence
    assert not any(isinstance(weight, tuple) for weight in sequence.weights.values())
    return replace(
        sequence,
        prompt_ids=sequence.prompt_ids + sequence.response_ids[:length],
        response_ids=sequence.response_ids[length:],
        prefix_tokens=0,
        hint_tokens=length,
    )


def hint_of(group: Group) -> Demonstration | None:
    """What all rollouts of a group begin with, as something to imitate; None where they begin with nothing."""
    length = group.rollouts[0].prefix_tokens
    if length == 0:
        return None
    return Demonstration(
        problem_id=group.problem.id, prompt_ids=group.prompt_ids, response_ids=group.rollouts[0].token_ids[:length]
    )
