"""Ranges of numeric fields, written beside the field's type, and the names of the usual ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Bounds:
    """Allowed range of a number: [low, high], with either end open if asked for."""

    low: float = float("-inf")
    high: float = float("inf")
    open_low: bool = False
    open_high: bool = False

    def contains(self, value: float) -> bool:
        """Whether `value` is finite and inside."""
        if value != value or abs(value) == float("inf"):
            return False
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return above and below

    def __str__(self) -> str:
        left = "" if self.low == float("-inf") else f"{'more than' if self.open_low else 'at least'} {_plain(self.low)}"
        right = (
            "" if self.high == float("inf") else f"{'less than' if self.open_high else 'at most'} {_plain(self.high)}"
        )
        return " and ".join(part for part in (left, right) if part) or "any number"


def _plain(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


Share = Annotated[float, Bounds(0.0, 1.0)]
PositiveShare = Annotated[float, Bounds(0.0, 1.0, open_low=True)]
ShareBelowOne = Annotated[float, Bounds(0.0, 1.0, open_high=True)]
NonNegative = Annotated[float, Bounds(0.0)]
Positive = Annotated[float, Bounds(0.0, open_low=True)]
Count = Annotated[int, Bounds(1)]
CountOrZero = Annotated[int, Bounds(0)]
Seed = Annotated[int, Bounds(0, 2**32 - 1)]
