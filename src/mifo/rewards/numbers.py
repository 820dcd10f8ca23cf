r"""Plain numbers, exactly: integers, decimals, simple fractions and powers-of-ten notation as `fractions.Fraction`.

Digits and exponents are bounded, so no answer can make exact arithmetic slow; a number beyond the bounds is not
plain, and the caller must ask elsewhere. Input is in the spelling of `spelling.normalise`.

Mixed numbers are read where nothing else can be meant: a space and a proper fraction, as in `3 1/2`. Not covered, on
purpose: `3\frac{1}{2}` (it may also be a product), roots, powers, anything with a letter.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

MAX_LENGTH = 300  # characters of a plain number
_MAX_EXPONENT = 300

_UNSIGNED = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
_SIGNED = rf"[+-]?{_UNSIGNED}"
_DECIMAL = re.compile(_SIGNED)
_FRACTION = re.compile(
    rf"(?P<sign>[+-]?)(?:"
    rf"\\frac ?(?:\{{(?P<a>{_SIGNED})\}}|(?P<a1>[0-9]))(?: ?\{{(?P<b>{_SIGNED})\}}|(?P<b1>[0-9]))"
    rf"|(?P<c>{_UNSIGNED})/(?P<d>{_SIGNED})"
    rf"|\((?P<e>{_SIGNED})\)/\((?P<f>{_SIGNED})\))"
)
_SCIENTIFIC = re.compile(
    rf"(?P<m>{_SIGNED})"
    rf"(?:\\(?:times|cdot) ?10\^(?:\{{(?P<x>[+-]?[0-9]{{1,4}})\}}|(?P<y>[0-9]))|[eE](?P<z>[+-]?[0-9]{{1,4}}))"
)
_MIXED = re.compile(r"(?P<sign>[+-]?)(?P<whole>[0-9]+) (?P<above>[0-9]+)/(?P<below>[0-9]+)")
_REPEATING = re.compile(
    r"(?P<sign>[+-]?)(?P<whole>[0-9]*)\.(?P<once>[0-9]*)\\(?:overline|bar|dot) ?\{(?P<again>[0-9]+)\}"
)
_BASED = re.compile(r"([0-9A-Za-z]+)_(?:\{ ?(?:\\text\{)?([0-9]{1,2})\}?\}|([0-9]))")


@dataclass(frozen=True, slots=True)
class Plain:
    """A plain number. `percent`: it was followed by a percent sign, and `value` is what stood before the sign."""

    value: Fraction
    percent: bool = False

    def equals(self, other: Plain) -> bool:
        """Exact equality; where only one side has a percent sign, 50% may stand for 50 as for 0.5."""
        if self.value == other.value:
            return True
        if self.percent == other.percent:
            return False
        per_cent, bare = (self, other) if self.percent else (other, self)
        return per_cent.value / 100 == bare.value


def parse_number(text: str) -> Plain | None:
    """The plain number that `text` spells, or None when it spells anything else or is beyond the bounds."""
    if not text or len(text) > MAX_LENGTH:
        return None
    percent = text.endswith("%")
    if percent:
        text = text[:-1].removesuffix("\\").rstrip()
    value = _fraction(text.removesuffix("^\\circ"))
    return None if value is None else Plain(value, percent)


def _fraction(text: str) -> Fraction | None:
    if text.startswith("{") and text.endswith("}"):
        text = text[1:-1]
    if text[:2] in ("- ", "+ "):
        text = text[0] + text[2:]
    if _DECIMAL.fullmatch(text):
        return _decimal(text)
    match = _FRACTION.fullmatch(text)
    if match:
        above = match["a"] or match["a1"] or match["c"] or match["e"]
        below = _decimal(match["b"] or match["b1"] or match["d"] or match["f"])
        sign = -1 if match["sign"] == "-" else 1
        return sign * _decimal(above) / below if below else None
    match = _SCIENTIFIC.fullmatch(text)
    if match:
        exponent = int(match["x"] or match["y"] or match["z"])
        return _decimal(match["m"]) * Fraction(10) ** exponent if abs(exponent) <= _MAX_EXPONENT else None
    return _mixed(text) or _repeating(text)


def _mixed(text: str) -> Fraction | None:
    match = _MIXED.fullmatch(text)
    if match is None or not 0 < int(match["above"]) < int(match["below"]):
        return None
    value = int(match["whole"]) + Fraction(int(match["above"]), int(match["below"]))
    return -value if match["sign"] == "-" else value


def _repeating(text: str) -> Fraction | None:
    """0.1\\overline{6} is (16 - 1)/90."""
    match = _REPEATING.fullmatch(text)
    if match is None:
        return None
    once, again = match["once"], match["again"]
    above = int(f"{match['whole']}{once}{again}") - int(f"{match['whole']}{once}" or "0")
    value = Fraction(above, (10 ** len(again) - 1) * 10 ** len(once))
    return -value if match["sign"] == "-" else value


def _decimal(text: str) -> Fraction:
    return Fraction(text.replace(",", "").rstrip("."))


@dataclass(frozen=True, slots=True)
class Based:
    """Digits with the base they are written in, as in 1011_2."""

    digits: str
    base: int

    @property
    def value(self) -> int | None:
        """The number, or None when a digit does not exist in the base."""
        try:
            return int(self.digits, self.base)
        except ValueError:
            return None


def parse_based(text: str) -> Based | None:
    r"""`4210_{5}` or `4210_5`, with a base from 2 to 36; None for anything else."""
    if len(text) > MAX_LENGTH:
        return None
    match = _BASED.fullmatch(text)
    if match is None or not match[1][0].isdigit():  # x_1 is a symbol with an index
        return None
    base = int(match[2] or match[3])
    return Based(match[1].lstrip("0").upper() or "0", base) if 2 <= base <= 36 else None
