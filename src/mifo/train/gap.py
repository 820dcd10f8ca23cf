"""How far the sampler's log-probs may be from the trainer's, and what is measured to know it.

Both compute the same weights, but round in different places. How much rounding moves a log-prob depends on the model, so the
limit is not a constant: the trainer scores some of the same rollouts in the low precision and in fp32, and

    limit = max(0.001, 2.2 · mean |log-prob in low precision − log-prob in fp32|)     nats

Measured in bf16: the honest gap is 1.3 to 1.5 of that difference, 1 % noise in the sampler's weights makes it 3 to 5
(docs/reliability.md). In fp32 there is nothing to measure, and the honest gap is about 1e-6.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

LEAST_LIMIT = 1e-3
ROUNDING_FACTOR = 2.2
MEASURE_EVERY = 16  # steps: rounding weighs less as a policy gets surer, so an old figure would be too generous
GAP_TOKENS = 256  # a gap over fewer tokens than this is completed by scoring rollouts that are not trained on
ROUNDING_TOKENS = 512


class SamplerWatch:
    """The limit of the gap, and the rounding it rests on.

    Args:
        limit: in nats; None to derive it from rounding.
        dtype: the lower of the two precisions of sampler and trainer.
    """

    def __init__(self, limit: float | None, dtype: torch.dtype) -> None:
        self.fixed = limit
        self.dtype = dtype
        self.rounding: float | None = 0.0 if dtype == torch.float32 else None
        self.age = 0

    def limit(self, gap: float, measure_rounding: Callable[[], float]) -> float:
        """The limit in nats that holds for a gap; measures rounding where none is known, it is old, or the gap exceeds it."""
        if self.fixed is not None:
            return self.fixed
        self.age += 1
        if self.dtype != torch.float32 and (
            self.rounding is None or self.age >= MEASURE_EVERY or gap > self._limit(self.rounding)
        ):
            self.rounding, self.age = measure_rounding(), 0
        assert self.rounding is not None
        return self._limit(self.rounding)

    @staticmethod
    def _limit(rounding: float) -> float:
        return max(LEAST_LIMIT, ROUNDING_FACTOR * rounding)

    def state_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"rounding": self.rounding, "age": self.age}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.rounding, self.age = state["rounding"], int(state["age"])
