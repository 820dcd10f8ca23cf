r"""Units after an answer: 5\text{ cm}^2, 25 degrees, 36 \text{ ways}.

A unit that only one side names does not matter, as in every grader of the field: the question gave it. Two known units
that differ are converted when they measure the same thing, and differ otherwise; unknown ones ("ways", "apples")
are not compared. Words that scale a number (million, dozen) are not units and are left where they are.
"""

from __future__ import annotations

import re
from fractions import Fraction

_TEXT_UNIT = re.compile(r"\s*\\(?:text|textrm|mathrm|mbox)\s*\{\s*([A-Za-z][A-Za-z ./\-]*)\}(\^(?:[23]|\{[23]\}))?")
_WORD_UNIT = re.compile(r"(?<=[0-9}]) ([A-Za-z]{2,}(?: [A-Za-z]{2,})*)(\^(?:[23]|\{[23]\}))?")
_NOT_A_UNIT = {
    "hundred",
    "thousand",
    "million",
    "billion",
    "trillion",
    "dozen",
    "percent",
    "or",
    "and",
    "mod",
    "base",
    "to",
}
_NOT_A_UNIT |= {"pi", "sin", "cos", "tan", "log", "ln", "sqrt", "if", "for", "when", "where", "with", "remainder", "is"}
_MAX_TAIL = 60  # characters that a unit may take

_LENGTH: dict[str, Fraction | int] = {"mm": 1, "cm": 10, "m": 1000, "km": 1_000_000}
_LENGTH |= {"in": Fraction(254, 10), "ft": Fraction(3048, 10), "yd": Fraction(9144, 10), "mi": Fraction(1_609_344)}
_WEIGHT: dict[str, Fraction | int] = {"mg": 1, "g": 1000, "kg": 1_000_000}
_TIME: dict[str, Fraction | int] = {"s": 1, "min": 60, "h": 3600, "day": 86_400, "week": 604_800}
_MONEY: dict[str, Fraction | int] = {"cent": 1, "dollar": 100}
_ALONE = "am pm north south east west left right up down degree radian"  # each measures what none of the others does
_SCALE = {
    name: (dimension, Fraction(factor))
    for dimension, table in (("length", _LENGTH), ("weight", _WEIGHT), ("time", _TIME), ("money", _MONEY))
    for name, factor in table.items()
}
_SCALE |= {name: (name, Fraction(1)) for name in _ALONE.split()}
_SPELLINGS = {
    "mm": "millimeter millimeters millimetre millimetres",
    "cm": "centimeter centimeters centimetre centimetres",
    "m": "meter meters metre metres",
    "km": "kilometer kilometers kilometre kilometres",
    "in": "inch inches",
    "ft": "foot feet",
    "yd": "yard yards",
    "mi": "mile miles",
    "g": "gram grams",
    "kg": "kilogram kilograms",
    "s": "second seconds sec secs",
    "min": "minute minutes mins",
    "h": "hour hours hr hrs",
    "day": "days",
    "week": "weeks",
    "cent": "cents",
    "dollar": "dollars",
    "degree": "degrees",
    "radian": "radians",
}
_NAMES = {spelling: name for name, spellings in _SPELLINGS.items() for spelling in spellings.split()}
_BARE_SHORT = {word for word in (*_SCALE, *_NAMES) if len(word) > 1} | {"sq", "cu", "mph", "way"}
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}


def split_unit(text: str) -> tuple[str, str]:
    """An answer as (what stands before the unit, the unit or ""). The unit is lower case, its power after a caret."""
    start = max(0, len(text) - _MAX_TAIL)
    for pattern in (_TEXT_UNIT, _WORD_UNIT):
        for match in pattern.finditer(text, start):
            words = match[1].lower().replace(".", " ").split()
            if pattern is _WORD_UNIT and not all(len(word) > 3 or word in _BARE_SHORT for word in words):
                continue  # 2 ab is a product
            if match.end() == len(text) and match.start() > 0 and not _NOT_A_UNIT.intersection(words):
                return text[: match.start()].rstrip(), _canonical(words, match[2])
    return text, ""


def _canonical(words: list[str], power: str | None) -> str:
    exponent = int(power.strip("^{}")) if power else 1
    if len(words) == 2 and words[0] in _POWERS:
        exponent, words = _POWERS[words[0]], words[1:]
    name = " ".join(_NAMES.get(word, word) for word in words)
    return name if exponent == 1 else f"{name}^{exponent}"


def ratio(gold: str, answer: str) -> Fraction | None:
    """What to multiply the answer by to have it in the gold's unit; None when the units measure different things.

    1 where a unit is missing, unknown, or the same.
    """
    if gold == answer:
        return Fraction(1)
    sides = [unit.partition("^") for unit in (gold, answer)]
    if any(name not in _SCALE for name, _, _ in sides):
        return Fraction(1)
    (gold_dimension, gold_factor), (dimension, factor) = (_SCALE[name] for name, _, _ in sides)
    powers = [int(power or 1) for _, _, power in sides]
    if gold_dimension != dimension or powers[0] != powers[1]:
        return None
    return (factor / gold_factor) ** powers[0]
