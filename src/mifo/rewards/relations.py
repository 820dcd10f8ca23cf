r"""Equalities in an answer: `x=5` answers 5, `9=3^2` answers 9, `5=204` answers nothing.

A verifier that looks only at the right-hand side pays for `5=204`. Here every member of a chain counts: the name
on the left is dropped, and each remaining member must equal the reference. A member with a variable before the last
one (`x+y=10`, `2x=10`) says what is being computed and is not compared with a reference that has none.
"""

from __future__ import annotations

import re

_NAME = re.compile(
    r"(?:\\(?:text|mathrm|mathbf|operatorname|vec|overrightarrow|overline|hat|bar) ?\{[A-Za-z ,.'\-]+\}"
    r"|\\[A-Za-z]+|[A-Za-z])"
    r"(?:'|_(?:[A-Za-z0-9]|\{[A-Za-z0-9,+\- ]{1,20}\})|\([A-Za-z0-9,+\- ]{1,20}\)| ?[A-Za-z]){0,12}"
)
_CONSTANTS = frozenset(
    {"\\pi", "\\infty", "\\sqrt", "\\frac", "\\times", "\\cdot", "\\circ", "\\pm", "\\binom", "\\log"}
)
_LETTERS = re.compile(r"\\[A-Za-z]+|[A-Za-z]")
_MEMBERSHIP = re.compile(r"([^\\]{1,20}|\\[A-Za-z]+ ?)\\in(?![A-Za-z]) ?(.*)", re.DOTALL)
_THOUSANDS_MARK = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_OPEN, _CLOSE = "({[", ")}]"


def split_top(text: str, separator: str) -> list[str]:
    """`text` split at `separator`, a comma or an equals sign, outside all brackets.

    The comma of 1,234 is no separator, and <=, >=, != and == are no equals signs.
    """
    inside = _part_of_operator if separator == "=" else _THOUSANDS_MARK.match
    parts, depth, start = [], 0, 0
    for i, character in enumerate(text):
        if character in _OPEN:
            depth += 1
        elif character in _CLOSE:
            depth -= 1
        elif character == separator and depth <= 0 and not inside(text, i):
            parts.append(text[start:i].strip())
            start = i + 1
    return [*parts, text[start:].strip()]


def _part_of_operator(text: str, i: int) -> bool:
    return text[i - 1 : i] in ("<", ">", "!", "=", ":", "~") or text[i + 1 : i + 2] == "="


def is_name(text: str) -> bool:
    r"""Whether `text` only names a quantity: x, f(x), A_1, \angle ABC, \text{Area}. Constants are no names."""
    return bool(_NAME.fullmatch(text)) and text not in _CONSTANTS and text not in ("e", "i")


def has_variable(text: str) -> bool:
    """Whether a letter other than e, i or a known command occurs."""
    return any(word not in _CONSTANTS and word not in ("e", "i") for word in _LETTERS.findall(text))


def members(gold: str, answer: str) -> tuple[str, tuple[str, ...]] | None:
    """What to compare: the reference, and the parts of the answer that must all equal it; None when no answer can.

    Both come in the spelling of `spelling.normalise`. An equation on the gold's side is left to the verifier whole.
    """
    gold, answer = _set_only(gold), _set_only(answer)
    if "=" not in gold and "=" not in answer:
        return gold, (answer,)
    if len(split_top(answer, ",")) > 1 or len(split_top(gold, ",")) > 1:
        return _lists(gold, answer)
    gold_name, gold_value = _assignment(gold)
    chain = split_top(answer, "=")
    if gold_value is None or (gold_name and len(chain) > 1 and chain[0] != gold_name):
        return gold, (answer,)
    kept = _claims(chain, gold_value)
    if not kept or (any(map(_equates, kept)) and not _equates(gold_value)):
        return None
    return gold_value, kept


def _claims(chain: list[str], gold: str) -> tuple[str, ...]:
    kept = chain[1:] if len(chain) > 1 and is_name(chain[0]) else chain
    if not has_variable(gold):
        kept = [part for part in kept[:-1] if not has_variable(part)] + kept[-1:]
    return tuple(kept) if all(kept) else ()


def _assignment(text: str) -> tuple[str | None, str | None]:
    """(name, value) of `name=value`, (None, text) without an equals sign, (None, None) of any other equation."""
    parts = split_top(text, "=")
    if len(parts) == 1:
        return None, text
    return (parts[0], parts[1]) if len(parts) == 2 and is_name(parts[0]) else (None, None)


def _lists(gold: str, answer: str) -> tuple[str, tuple[str, ...]] | None:
    """Lists such as x=1, y=2: names go where the other side has none, and then no equation may be left."""
    if "=" not in answer:
        gold = _values(gold)
    elif "=" not in gold:
        answer = _values(answer)
        if _equates(answer):
            return None
    return gold, (answer,)


def _values(text: str) -> str:
    pairs = [_assignment(element) for element in split_top(text, ",")]
    return text if any(value is None for _, value in pairs) else ",".join(value for _, value in pairs if value)


def _equates(text: str) -> bool:
    """Whether an equals sign is left anywhere but in an index, as in \\sum_{k=1}."""
    depth, index_depth = 0, 0
    for i, character in enumerate(text):
        if character == "{":
            depth += 1
            if not index_depth and text[i - 1 : i] == "_":
                index_depth = depth
        elif character == "}":
            index_depth = 0 if index_depth == depth else index_depth
            depth -= 1
        elif character == "=" and not index_depth and not _part_of_operator(text, i):
            return True
    return False


def _set_only(text: str) -> str:
    r"""`S` of `x \in S`."""
    match = _MEMBERSHIP.fullmatch(text)
    return match[2].strip() if match and is_name(match[1].strip()) else text
