"""Which rollouts of a step are written to samples.jsonl, and how."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mifo.types import Group, TokenIds


def sample_records(groups: Sequence[Group], wanted: int, decode: Callable[[TokenIds], str]) -> Iterator[dict[str, Any]]:
    """Up to `wanted` rollouts, spread evenly over the step's, as plain data."""
    shown = [(group, i) for group in groups for i in range(len(group.rollouts))]
    stride = max(1, len(shown) // wanted) if wanted else len(shown) + 1
    for group, i in shown[::stride][:wanted]:
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
