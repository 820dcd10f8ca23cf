r"""Whether two mathematical expressions are equal, by math-verify. Imported by worker processes alone.

It may take forever, exhaust memory or crash on hostile input; the worker's parent bounds all of that. Compared with
calling math-verify on the text:

- The whole answer must parse (math-verify falls back to a part of it, so that 1-1/e equals 1+1/e by their "1").
- What it calls equal is checked once more: it rounds to 6 decimals and drops differences below 1e-15, by which
  1/2^98 equals 1/2^99 and 3.1415927 equals pi. Decimals must agree to 1e-12 of
  their size and exact numbers to 1e-35; expressions are checked at one point, each variable at its own prime.
- Units are not stripped by its word list, which takes the "t" of 2t for one.
- Variables that differ in case differ (a triangle has sides a and angles A), but for C and c, the constant of integration.
- i is the imaginary unit where no other variable is on either side: i^2 is -1.
- Numbers are read here. The library gives their text to sympy, which gives it to `eval`.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import re
import typing
from collections.abc import Callable
from itertools import cycle
from typing import TypeAlias

import sympy.physics.units  # noqa: F401 - sympy loads it when it first meets a unit, which takes `eval`
from latex2sympy2_extended.latex2sympy2 import ConversionConfig, _Latex2Sympy
from latex2sympy2_extended.math_normalization import NormalizationConfig, normalize_latex
from math_verify import verify
from math_verify.grader import should_treat_as_complex
from sympy import Basic, Expr, Float, I, Integer, MatrixBase, Number, Rational, Symbol, Tuple
from sympy import FiniteSet as SympyFiniteSet
from sympy.polys import monomials

GENERATORS = frozenset({collections.__file__, dataclasses.__file__, typing.__file__, monomials.__file__})
"""Files that compile code which they wrote themselves, from identifiers, annotations or numbers of variables."""

logging.getLogger("math_verify").setLevel(logging.CRITICAL)

_NORMALIZATION = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
)
_CASE_MATTERS = ConversionConfig(lowercase_symbols=False)
_IMAGINARY = re.compile(r"(?<![A-Za-z\\_])i(?![A-Za-z_(])")
_THOUSANDS = re.compile(r"\s*-?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?\s*")
_DIGITS_ONLY = re.compile(r"-?[0-9]+")
_DECIMAL = re.compile(r"-?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?")
_DIGITS = 40
_TOLERANCE = Rational(1, 10**35)
_DECIMAL_TOLERANCE = Rational(1, 10**12)  # decimals arrive as floats
_POINT = (3, 2, 5, 7, 11, 13)
ComplexPair: TypeAlias = tuple[Number, Number]
_WARM = (
    ("x+1", "1+x"),
    (r"\frac{1}{2}", r"\frac{\sqrt{2}}{2}"),
    ("(1,2)", r"\{1,2\}"),
    (r"x \le 2", r"(-\infty,2]"),
    ("x^2+2.5x=0", r"2x=\pi"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"),
)
_DOTS = ("\\ldots", "\\dots", "\\cdots", "...", "…")


class UnreadableGoldError(Exception):
    """The reference is no expression that the parser knows; no verdict can be given."""


class _UnreadableError(Exception):
    pass


class _Parser(_Latex2Sympy):
    """The library's parser, reading numbers itself: the library's own way ends in `eval` of their text (sympy.Number)."""

    def parse(self, latex_str: str) -> Basic | MatrixBase:
        return self.parse_number(latex_str) if _THOUSANDS.fullmatch(latex_str) else super().parse(latex_str)

    def parse_number(self, text: str) -> Number:
        digits = text.replace(",", "").strip()
        if _DIGITS_ONLY.fullmatch(digits):
            return Integer(int(digits))
        if _DECIMAL.fullmatch(digits):
            return Float(digits)
        raise _UnreadableError(text)


def equal(gold: str, parts: list[str]) -> bool:
    """Whether every part equals the gold. Raises UnreadableGoldError, and whatever the libraries raise."""
    return all(_equals(gold, part) for part in parts)


def warm_up() -> None:
    """Fills the parser's and the library's caches by comparisons of ours, which processes forked later then share."""
    for gold, answer in _WARM:
        equal(gold, [answer])


def _equals(gold: str, part: str) -> bool:
    imaginary = bool(_IMAGINARY.search(gold) or _IMAGINARY.search(part))
    try:
        reference = _parse(gold, imaginary)
    except _UnreadableError as error:
        raise UnreadableGoldError(gold) from error
    try:
        answer = _parse(part, imaginary)
    except _UnreadableError:
        return False
    if imaginary:
        reference, answer = _with_imaginary_unit(reference, answer)
    if _names(reference) != _names(answer) and _names(reference, str.lower) == _names(answer, str.lower):
        return False
    agreed = verify(reference, answer, timeout_seconds=None, raise_on_error=True, allow_set_relation_comp=True)
    return agreed and not _differ(reference, answer)


def _parse(text: str, imaginary: bool) -> Basic | MatrixBase:
    if any(dots in text for dots in _DOTS):  # the parser drops them: 1,2,...,n would be the list 1, 2, n
        raise _UnreadableError(text)
    latex = normalize_latex(text, _NORMALIZATION)
    try:
        real = not (imaginary or should_treat_as_complex(latex))
        parsed = _Parser(is_real=real, config=_CASE_MATTERS).parse(latex)
    except (MemoryError, RecursionError):
        raise
    except Exception as error:  # the parser raises bare Exception for what it cannot read
        raise _UnreadableError(text) from error
    names = {symbol.name: symbol for symbol in parsed.free_symbols}
    if "C" in names and "c" not in names:
        parsed = parsed.subs(names["C"], Symbol("c", **names["C"].assumptions0))
    return parsed


def _names(expression: Basic | MatrixBase, spell: Callable[[str], str] = str) -> set[str]:
    return {spell(symbol.name) for symbol in expression.free_symbols}


def _with_imaginary_unit(*expressions: Basic | MatrixBase) -> list[Basic | MatrixBase]:
    """The expressions with i as the imaginary unit, where they are values or lists of values and have no other variable."""
    plain = all(elements is not None for elements in map(_elements, expressions))
    if not plain or any(_names(expression) - {"i"} for expression in expressions):
        return list(expressions)
    return [expression.subs(dict.fromkeys(expression.free_symbols, I)) for expression in expressions]


def _differ(gold: Basic | MatrixBase, answer: Basic | MatrixBase) -> bool:
    """Whether two expressions that were called equal are numerically apart."""
    left, right = _values(gold), _values(answer)
    if left is None or right is None or len(left) != len(right):
        return False  # relations, intervals and mixed things: nothing to measure
    tolerance = _DECIMAL_TOLERANCE if gold.has(Float) or answer.has(Float) else _TOLERANCE
    return any(not _near(*pair, tolerance) for pair in zip(left, right, strict=True))


def _values(expression: Basic | MatrixBase) -> list[ComplexPair] | None:
    """The values of an expression, or of every element of a matrix, tuple or set; None where one has no value."""
    elements = _elements(expression)
    if elements is None:
        return None
    found = [_value(element) for element in elements]
    values = [value for value in found if value is not None]
    if len(values) < len(found):
        return None
    return sorted(values) if isinstance(expression, SympyFiniteSet) else values


def _elements(expression: Basic | MatrixBase) -> list[Expr] | None:
    """The elements of a matrix, tuple or set, or the expression itself; None where there is anything but expressions."""
    if isinstance(expression, MatrixBase):
        elements = list(expression.flat())
    elif isinstance(expression, (Tuple, SympyFiniteSet)):
        elements = list(expression.args)
    else:
        elements = [expression]
    return elements if all(isinstance(element, Expr) for element in elements) else None


def _value(expression: Expr) -> ComplexPair | None:
    """Real and imaginary part to 40 digits, with each variable at a small integer; None if not finite."""
    symbols = sorted(expression.free_symbols, key=str)
    point = dict(zip(symbols, cycle(_POINT), strict=False))
    value = expression.subs(point).evalf(_DIGITS)
    if not value.is_number:
        return None
    real, imaginary = value.as_real_imag()
    if not (real.is_finite and imaginary.is_finite and real.is_Number and imaginary.is_Number):
        return None
    return _clean(real), _clean(imaginary)


def _clean(number: Number) -> Number:
    """Zero in place of what cancelled: evalf marks it by a precision of a few bits."""
    return Integer(0) if isinstance(number, Float) and number._prec < 16 else number


def _near(left: ComplexPair, right: ComplexPair, tolerance: Rational) -> bool:
    size = max(abs(part) for part in (*left, *right))
    return all(abs(a - b) <= tolerance * size for a, b in zip(left, right, strict=True))
