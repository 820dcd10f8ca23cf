"""What a family of embedded problems is made of.

A family draws problems of a level from a source of integers; nothing here depends on a library or on Python's own
hashing, so the same problem comes out on every platform and version. `random.Random.random()` is the one method whose
sequence Python promises to keep, so every draw is made from it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from mifo.types import GraderName

LEVELS = 3
T = TypeVar("T")


def digest(text: str) -> int:
    """The first 64 bits of SHA-256 of `text`: a hash that is the same everywhere, unlike `hash()`."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")


class Draw:
    """Uniform integers and choices from an explicit integer seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def between(self, low: int, high: int) -> int:
        """A uniform integer in [low, high], both ends included."""
        return low + int(self._random.random() * (high - low + 1))

    def choice(self, items: Sequence[T]) -> T:
        """A uniform element of a non-empty sequence."""
        return items[self.between(0, len(items) - 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One drawn problem.

    `canonical` is the content by which the split is chosen: operands sorted where their order does not matter, so that
    a problem and its permutation are never on two sides of a split. `steps` is the reasoning, without the final box.
    """

    text: str
    canonical: str
    steps: str
    answer: str

    @property
    def demonstration(self) -> str:
        """The steps, one a line, and the answer in a box."""
        return f"{self.steps}\n\\boxed{{{self.answer}}}" if self.steps else f"\\boxed{{{self.answer}}}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A kind of problem: `draw(source, level)` makes one of level 1 (easy) to 3 (hard).

    `in_training` is False for the families that are kept for the out-of-distribution test; `default` is False for a
    family that has to be named to be used.
    """

    name: str
    description: str
    draw: Callable[[Draw, int], Item]
    in_training: bool = True
    grader: GraderName = "math"
    default: bool = True


def join_sorted(numbers: Sequence[int]) -> str:
    """The numbers in ascending order as text, for a canonical form."""
    return ",".join(str(n) for n in sorted(numbers))
