"""What is asked of an engine: checks before any compute, and the split of the rows into batches.

Every engine calls `check_request` first, so that a wrong request fails in the same way everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mifo.errors import ConfigError, DataError
from mifo.types import Sampling, TokenIds


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a model can take: prompt and response together up to `context` tokens (None: no limit), ids below
    `vocab_size`."""

    context: int | None
    vocab_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """The rollouts `first .. first + count - 1` of prompt number `prompt`."""

    prompt: int
    first: int
    count: int


def check_request(prompts: Sequence[TokenIds], n: int, sampling: Sampling, limits: Limits) -> None:
    """Raise ConfigError or DataError for a request that cannot be served; see the messages for the rules."""
    if n < 1:
        raise ConfigError(f"rollouts per prompt = {n}: at least one response is drawn for each prompt; use 1 or more")
    _check_sampling(sampling, limits)
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise DataError(f"prompt {index} is empty: a model needs at least one token to continue; drop the prompt")
        if min(prompt) < 0 or max(prompt) >= limits.vocab_size:
            raise DataError(
                f"prompt {index} holds token id {min(prompt) if min(prompt) < 0 else max(prompt)}, outside the model's "
                f"vocabulary of {limits.vocab_size}: use the tokenizer that belongs to the model"
            )
        if limits.context is not None and len(prompt) + sampling.max_tokens > limits.context:
            raise ConfigError(
                f"max_tokens = {sampling.max_tokens}: with prompt {index} ({len(prompt)} tokens) it exceeds the "
                f"model's context of {limits.context} tokens; lower max_tokens or drop long prompts"
            )


def _check_sampling(sampling: Sampling, limits: Limits) -> None:
    if not 0 <= sampling.temperature < float("inf"):  # also refuses NaN
        raise ConfigError(f"temperature = {sampling.temperature}: must be 0 (greedy) or a positive number")
    if not 0 < sampling.top_p <= 1:
        raise ConfigError(f"top_p = {sampling.top_p}: is a share of probability; use a value above 0 and up to 1")
    if sampling.max_tokens < 1:
        raise ConfigError(f"max_tokens = {sampling.max_tokens}: a response has at least one token; use 1 or more")
    for stop in sampling.stop_ids:
        if not 0 <= stop < limits.vocab_size:
            raise ConfigError(
                f"stop_ids holds {stop}, outside the model's vocabulary of {limits.vocab_size}: it would never be "
                "sampled; use ids of the model's tokenizer"
            )


def plan_batches(prompts: Sequence[TokenIds], n: int, max_batch_rows: int | None) -> list[tuple[Span, ...]]:
    """Batches of at most `max_batch_rows` rows. Groups stay whole where they fit; prompts of like length meet.

    With one batch the order is that of the prompts. No result depends on the split: random numbers belong to a
    (prompt, rollout) pair, not to a batch.
    """
    if not prompts:
        return []
    if max_batch_rows is None or len(prompts) * n <= max_batch_rows:
        return [tuple(Span(prompt=i, first=0, count=n) for i in range(len(prompts)))]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    if n > max_batch_rows:
        starts = range(0, n, max_batch_rows)
        return [(Span(prompt=i, first=s, count=min(max_batch_rows, n - s)),) for i in order for s in starts]
    per_batch = max_batch_rows // n
    chunks = [order[i : i + per_batch] for i in range(0, len(order), per_batch)]
    return [tuple(Span(prompt=i, first=0, count=n) for i in chunk) for chunk in chunks]
