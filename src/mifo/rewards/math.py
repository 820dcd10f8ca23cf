r"""Mathematical answers: what can be decided exactly and at once, and what must be asked of math-verify.

`decide` is certain or silent. It says CORRECT where both sides are the same text in one spelling or the same plain
number, WRONG where both are plain numbers that differ (or the answer cannot be an answer at all), and otherwise returns
the comparison for a worker process (`pool`), which alone parses with a library. Numbers are compared exactly: 0.333
and 0.33333333 are not 1/3, and 3.1415927 is not pi.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from mifo.rewards.choice import letter_of
from mifo.rewards.numbers import Plain, parse_based, parse_number
from mifo.rewards.relations import members
from mifo.rewards.spelling import EMPTY, is_text, normalise
from mifo.rewards.units import ratio, split_unit
from mifo.types import Verdict

MAX_CHARS = 2000
"""Longest gold or answer that is compared; beyond it the verdict is ERROR unless both are the same text."""

_CHOICES = frozenset("ABCDEFGHIJ")
_EMPTY = frozenset({EMPTY, "no solution", "no solutions", "the empty set", "empty set"})
_WORDS = re.compile(r"[A-Za-z]{2,}(?: [A-Za-z]+)*")
_TIME = re.compile(r"(1?[0-9]|2[0-4]):([0-5][0-9])")
_CLOCK = re.compile(r"[0-9]{1,9}(?::[0-9]{1,9})+")


@dataclass(frozen=True, slots=True)
class Comparison:
    """A question for a worker: does every one of `parts` equal `gold`?"""

    gold: str
    parts: tuple[str, ...]


def decide(gold: str, answer: str) -> Verdict | Comparison:
    """The verdict on a bare answer against a bare gold (both without box), or what a worker must compare."""
    if gold == answer:
        return Verdict.CORRECT
    if not answer:
        return Verdict.WRONG
    if len(gold) > MAX_CHARS or len(answer) > MAX_CHARS:
        return Verdict.ERROR
    left, right = normalise(gold), normalise(answer)
    if left == right:
        return Verdict.CORRECT
    if left in _CHOICES and letter_of(right) == left:  # (C) or C) 5 for C: data sets mix in multiple choice
        return Verdict.CORRECT
    if EMPTY in (left, right) and {left.lower(), right.lower()} <= _EMPTY:
        return Verdict.CORRECT
    if is_text(gold) and parse_number(left) is None and len(left) > 1:
        return _compare_words(left, right)
    if _WORDS.fullmatch(left) and left.lower() == right.lower():  # Monday, no: words where nothing says so
        return Verdict.CORRECT
    both = members(left, right)
    if both is None:
        return Verdict.WRONG
    return _decide_parts(*both)


def _outer(text: str) -> str:
    r"""What encloses the whole of a text: "set" for \{1,2\}, "row" for (1,2), [1,2] and [1,2), else ""."""
    closing = {"\\{": "\\}", "(": ")]", "[": ")]"}
    opener = text[:2] if text.startswith("\\{") else text[:1]
    if opener not in closing or not text.endswith(("\\}",) if opener == "\\{" else (")", "]")):
        return ""
    inside = text[len(opener) : -len(opener)]
    depth = 0
    for character in inside:
        depth += (character in "([{") - (character in ")]}")
        if depth < 0:
            return ""  # (1,2)\cup(3,4): the first bracket closes before the end
    return "set" if opener == "\\{" else "row"


def _set_against_row(gold: str, answer: str) -> bool:
    """Whether one is a set of listed elements and the other a point or an interval, which the verifier takes for equal."""
    if {_outer(gold), _outer(answer)} != {"set", "row"}:
        return False
    return not any(mark in text for mark in (":", "|", "\\mid") for text in (gold, answer))


def _different_clock(gold: str, answer: str) -> bool:
    """Whether both are times or ratios (6:30, 1:2:3) of which neither can stand for the other."""
    if not (_CLOCK.fullmatch(gold) and _CLOCK.fullmatch(answer)):
        return False
    left, right = ([int(part) for part in text.split(":")] for text in (gold, answer))
    proportional = len(left) == len(right) and all(
        a * right[0] == b * left[0] for a, b in zip(left, right, strict=True)
    )
    return left != right and (0 in left or 0 in right or not proportional)


def _time_against_number(gold: str, answer: str) -> bool:
    """Whether the gold can only be a time (6:30: a ratio would be in lowest terms) and the answer is one number."""
    time = _TIME.fullmatch(gold)
    return time is not None and math.gcd(int(time[1]), int(time[2])) > 1 and parse_number(answer) is not None


def _decide_parts(gold: str, parts: tuple[str, ...]) -> Verdict | Comparison:
    gold_body, gold_unit = split_unit(gold)
    open_parts: list[str] = []
    for part in parts:
        if part == gold:
            continue
        body, unit = split_unit(part)
        scale = ratio(gold_unit, unit)
        if (
            scale is None
            or _set_against_row(gold, part)
            or _different_clock(gold, part)
            or _time_against_number(gold, part)
        ):
            return Verdict.WRONG
        if (gold_unit == "radian" and part.endswith("^\\circ")) or (gold.endswith("^\\circ") and unit == "radian"):
            return Verdict.WRONG
        equal = _same_number(gold_body, body, scale)
        if equal is False:
            return Verdict.WRONG
        if equal is None:  # a conversion that is not between plain numbers is left to the verifier with its unit on
            open_parts.append(body if scale == 1 else part)
    return Comparison(gold_body, tuple(open_parts)) if open_parts else Verdict.CORRECT


def _same_number(gold: str, answer: str, scale: Fraction) -> bool | None:
    """Whether two plain numbers are equal; None unless both are plain."""
    left, right = parse_number(gold), parse_number(answer)
    if left is not None and right is not None:
        return left.equals(Plain(right.value * scale, right.percent))
    return _same_digits(gold, answer)


def _same_digits(gold: str, answer: str) -> bool | None:
    """Numbers with a base: equal values, or equal digits where only one side names its base."""
    left, right = parse_based(gold), parse_based(answer)
    if left and right:
        return None if left.value is None or right.value is None else left.value == right.value
    based, other = (left, answer) if left else (right, gold)
    if based is None:
        return None
    return True if other.lstrip("0").upper() == based.digits else None


def _compare_words(gold: str, answer: str) -> Verdict:
    return Verdict.CORRECT if _words(gold) == _words(answer) else Verdict.WRONG


def _words(text: str) -> str:
    r"""Lower case, without wrappers and brackets around it: `(C)`, `\text{C}` and `C` are one."""
    return " ".join(text.strip("()[]{} .").lower().split())
