"""From what rollouts begin with to requests of a rollout engine, and back to whole responses.

A request has one number of rollouts for each prompt and one longest response, and prompt and response must fit the model's
context. Rollouts that begin with a prefix get the prompt with the prefix behind it; since a prefix leaves less of the longest
response, those of like length go together, and what is sampled beyond the longest response is cut off, as the sources do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mifo.types import Problem, Rollout, Sampling, TokenIds


@dataclass(frozen=True, slots=True)
class Start:
    """One group to be sampled: `lengths` has the prefix tokens that each rollout takes of the demonstration."""

    problem: Problem
    prompt_ids: TokenIds
    lengths: tuple[int, ...]
    demonstration_ids: TokenIds


@dataclass(frozen=True, slots=True)
class Row:
    """Rollouts that begin alike: the `places` of start number `start`."""

    start: int
    places: tuple[int, ...]
    prefix: TokenIds


@dataclass(frozen=True, slots=True)
class Request:
    """One call of the engine: `count` rollouts for the prompt of each row."""

    rows: tuple[Row, ...]
    prompts: tuple[TokenIds, ...]
    count: int
    sampling: Sampling


def plan_requests(starts: Sequence[Start], sampling: Sampling, context: Callable[[], int]) -> list[Request]:
    """The requests that give every rollout of every start; one where no rollout has a prefix.

    Args:
        starts: in the order of their problems.
        sampling: `max_tokens` bounds a whole response, the prefix included.
        context: the model's; asked for only where there are prefixes.
    """
    if not any(any(start.lengths) for start in starts):
        rows = [Row(i, tuple(range(len(start.lengths))), ()) for i, start in enumerate(starts)]
        return _requests(starts, rows, sampling, slack=0)
    # What a request may sample beyond the longest response without leaving the context, which holds prompt and response.
    slack = context() - sampling.max_tokens - max(len(start.prompt_ids) for start in starts)
    rows = [
        Row(i, tuple(p for p, n in enumerate(start.lengths) if n == length), start.demonstration_ids[:length])
        for i, start in enumerate(starts)
        for length in sorted(set(start.lengths))
    ]
    for row in rows:
        held = len(starts[row.start].demonstration_ids)
        assert len(row.prefix) < min(held or 1, sampling.max_tokens), "a prefix leaves something to sample"
    return _requests(starts, rows, sampling, slack)


def _requests(starts: Sequence[Start], rows: Sequence[Row], sampling: Sampling, slack: int) -> list[Request]:
    """Rows of as many rollouts, and of prefixes that differ by at most `slack` tokens, together; in the order of their starts."""
    requests = []
    for count in sorted({len(row.places) for row in rows}, reverse=True):
        alike = [row for row in rows if len(row.places) == count]
        lengths = sorted({len(row.prefix) for row in alike})
        while lengths:
            shortest = lengths[0]
            taken = tuple(row for row in alike if shortest <= len(row.prefix) <= shortest + slack)
            lengths = [length for length in lengths if length > shortest + slack]
            prompts = tuple(starts[row.start].prompt_ids + row.prefix for row in taken)
            cut = replace(sampling, max_tokens=sampling.max_tokens - shortest) if shortest else sampling
            requests.append(Request(taken, prompts, count, cut))
    return requests


def continued(rollout: Rollout, prefix: TokenIds, sampling: Sampling) -> Rollout:
    """The whole response that a sampled continuation makes with its prefix, cut to the longest response."""
    if not prefix:
        return rollout
    room = sampling.max_tokens - len(prefix)
    return Rollout(
        token_ids=prefix + rollout.token_ids[:room],
        logprobs=rollout.logprobs[:room],
        stop=rollout.stop if len(rollout.token_ids) <= room else "length",
        weight_version=rollout.weight_version,
        prefix_tokens=len(prefix),
    )
