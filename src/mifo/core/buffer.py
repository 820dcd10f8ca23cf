"""The buffer of hard questions: B of Algorithm 1."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from mifo.errors import ConfigError
from mifo.types import Demonstration


class QuestionBuffer:
    """Demonstrations of the questions the model fails, each question at most once.

    Args:
        capacity: S; `full` turns true when at least so many are held. Nothing is ever dropped for space: what a step adds
            beyond S is learned too ("fully consumed", S0 §3.1).
        order: "fifo" takes the oldest first, "lifo" the newest (as ReLIFT's code does).
    """

    def __init__(self, capacity: int, order: Literal["fifo", "lifo"] = "fifo") -> None:
        if not isinstance(capacity, int) or capacity < 1 or order not in ("fifo", "lifo"):
            raise ConfigError(
                f"QuestionBuffer({capacity!r}, {order!r}): a whole number of at least 1, and 'fifo' or 'lifo'."
            )
        self.capacity = capacity
        self.order = order
        self._held: dict[str, Demonstration] = {}

    def add(self, demonstration: Demonstration) -> bool:
        """Append; False if a demonstration of this problem is already waiting."""
        if demonstration.problem_id in self._held:
            return False
        self._held[demonstration.problem_id] = demonstration
        return True

    def take(self, count: int | None = None) -> list[Demonstration]:
        """Remove and return `count` demonstrations (None: all) in the buffer's order; fewer if fewer are held."""
        keys = list(self._held) if self.order == "fifo" else list(reversed(self._held))
        return [self._held.pop(key) for key in keys[:count]]

    @property
    def full(self) -> bool:
        """|B| ≥ S."""
        return len(self) >= self.capacity

    def __len__(self) -> int:
        return len(self._held)

    def __iter__(self) -> Iterator[Demonstration]:
        return iter(self._held.values())

    def state_dict(self) -> dict[str, Any]:
        """The demonstrations in order of arrival, as plain data."""
        return {"held": [[d.problem_id, list(d.prompt_ids), list(d.response_ids)] for d in self]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._held = {
            problem_id: Demonstration(problem_id=problem_id, prompt_ids=tuple(prompt), response_ids=tuple(response))
            for problem_id, prompt, response in state["held"]
        }
