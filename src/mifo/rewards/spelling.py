r"""One spelling for what LaTeX can spell in many ways, before answers are compared as text or as numbers.

Only what keeps the meaning is changed: dollar signs, \left and \right, spacing commands, text wrappers around the
whole answer, \dfrac, thousands marks that are not plain commas, a full stop at the end. Everything is linear in the
length; callers bound the length all the same.
"""

from __future__ import annotations

import re

_CHARACTERS = str.maketrans(
    {
        "−": "-",  # minus sign
        "–": "-",  # en dash, which tokenizers often give for a minus
        "×": "\\times ",
        "·": "\\cdot ",
        "π": "\\pi ",
        "∞": "\\infty ",
        "°": "^\\circ ",
        "％": "%",
        "，": ",",
        "\u00a0": " ",
        "\u202f": " ",
    }
)
_REPLACEMENTS = (
    (re.compile(r"\\[dtc]frac(?![A-Za-z])"), r"\\frac"),
    (re.compile(r"\\(?:left|right|[bB]igg?[lr]?)\.(?![0-9])"), ""),
    (re.compile(r"\\(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|limits)(?![A-Za-z])"), ""),
    (re.compile(r"(?<=[0-9])(?:,\\!|\{,\}|\\,|,\\,)\s*(?=[0-9]{3}(?![0-9]))"), ","),  # 1{,}000 and kin
    (re.compile(r"\\[!]"), ""),
    (re.compile(r"(?<!\\)\\(?:[,;:>\s]|quad(?![A-Za-z])|qquad(?![A-Za-z]))|~"), " "),
    (re.compile(r"\{:\}"), ":"),
    (re.compile(r"\\(?:varnothing|empty)(?![A-Za-z])"), r"\\emptyset"),
    (re.compile(r"\\(?:leq|leqslant)(?![A-Za-z])|≤"), r"\\le "),
    (re.compile(r"\\(?:geq|geqslant)(?![A-Za-z])|≥"), r"\\ge "),
    (re.compile(r"\\(?:mathrm|text|rm)\s*\{\s*([ei])\s*\}"), r"\1"),  # an upright e or i is the constant
    (re.compile(r"\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\\degree(?:s|)(?![A-Za-z])"), r"^\\circ "),
    (re.compile(r"\\sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (re.compile(r"\\\$|\$|(?<!\\)\\[()\[\]]"), ""),  # money and mathematics delimiters alike
)
EMPTY = "\\emptyset"
_EMPTY_BRACES = re.compile(r"\\\{\s*\\\}")
# An amount of money and nothing else: the dollar sign is its unit, where it is not the one that begins mathematics.
_MONEY = re.compile(r"\$?\s{0,3}(-?)\s{0,3}\\\$\s{0,3}([0-9](?:[0-9.,{}!\\]*[0-9])?)\s{0,3}\.?\s{0,3}\$?")
_WRAPPER = re.compile(
    r"\\(?:text|textbf|textit|textrm|textnormal|mathrm|mathbf|mathit|mbox|operatorname)\s*\{([^{}]*)\}"
)
# "x=1 or x=2" is the list x=1, x=2; "x<1 or x>3" is left as it is, since there "or" and "and" differ.
_CONJUNCTION = re.compile(r"(?:,\s*)?(?:\\(?:text|textrm|mathrm|mbox)\s*\{\s*(?:or|and)\s*\}|(?<=\s)(?:or|and)(?=\s))")
_INEQUALITY = re.compile(r"[<>]|\\(?:le|ge|lt|gt|ne|neq|leq|geq)(?![A-Za-z])")
_DOUBLE_BACKSLASH = re.compile(r"\\\\(?=[A-Za-z])")
# A space stays only where removing it could join two words or numbers ("3 1/2"), or turn a list into a number
# ("1, 234" is not 1234).
_NEEDLESS_SPACE = re.compile(r"(?<![A-Za-z0-9,])\s+|(?<=,)\s+(?![0-9]{3}(?![0-9]))|\s+(?![A-Za-z0-9\s])")
_SPACES = re.compile(r"\s+")


def normalise(text: str) -> str:
    r"""One spelling of an answer: `\left( 3, \dfrac{1}{2} \right).` -> `(3,\frac{1}{2})`."""
    text = text.translate(_CHARACTERS)
    if money := _MONEY.fullmatch(text.strip()):
        text = f"{money[1]}{money[2]}\\text{{ dollars}}"
    if "\\begin" not in text:  # in a matrix \\\\ ends a row; elsewhere before a letter it is a backslash escaped twice
        text = _DOUBLE_BACKSLASH.sub(r"\\", text)
    for pattern, replacement in _REPLACEMENTS:
        text = pattern.sub(replacement, text)
    if not _INEQUALITY.search(text):
        text = _CONJUNCTION.sub(",", text)
    text = _SPACES.sub(" ", text).strip()
    if text.startswith("**") and text.endswith("**"):  # Markdown's bold
        text = text[2:-2].strip()
    text = _EMPTY_BRACES.sub(EMPTY.replace("\\", "\\\\"), _NEEDLESS_SPACE.sub("", text))
    return _final_stop(unwrap(_final_stop(text)))


def unwrap(text: str) -> str:
    r"""`text` without the \text{}, \mathbf{}, ... around the whole of it."""
    wrapped = _WRAPPER.fullmatch(text)
    return wrapped[1].strip() if wrapped else text


def is_text(raw: str) -> bool:
    r"""Whether the answer is wholly inside a text wrapper, as in \text{Evelyn}: words, not a product of symbols."""
    return _WRAPPER.fullmatch(raw.strip().strip("$").strip()) is not None


def _final_stop(text: str) -> str:
    return text[:-1].rstrip() if text.endswith(".") and not text.endswith("..") else text
