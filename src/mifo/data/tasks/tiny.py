"""The tiny family: problems of at most 12 characters for a character-level model that starts from random weights.

The whole alphabet of its problems is the ten digits, `+ - =`, a space and the letters of `copy` and `max`; an answer is
one or two digits in a box, without steps.
"""

from __future__ import annotations

from mifo.data.tasks.base import Draw, Family, Item, join_sorted


def tiny(draw: Draw, level: int) -> Item:
    """Level 1 copies a number, level 2 adds two digits, level 3 subtracts them or takes the larger."""
    a, b = draw.between(0, 9), draw.between(0, 9)
    if level == 1:
        n = draw.between(0, 99)
        return Item(text=f"copy {n}", canonical=f"copy {n}", steps="", answer=str(n))
    if level == 2:
        return Item(text=f"{a}+{b}=", canonical=f"add {join_sorted((a, b))}", steps="", answer=str(a + b))
    if draw.between(0, 1):
        return Item(text=f"max {a} {b}", canonical=f"max {join_sorted((a, b))}", steps="", answer=str(max(a, b)))
    a, b = max(a, b), min(a, b)
    return Item(text=f"{a}-{b}=", canonical=f"{a}-{b}", steps="", answer=str(a - b))


FAMILIES = (
    Family(name="tiny", description="single-digit problems for a model from random weights", draw=tiny, default=False),
)
