"""Text from outside, made fit for a terminal.

What a model writes, and what data, model and configuration files hold, may carry escape sequences that recolour, retitle or
rewrite a terminal, and marks that reorder what is read (CVE-2021-42574). Nothing of it is shown raw.
"""

from __future__ import annotations

import json
import logging
import unicodedata

# Controls, formats (bidirectional marks, tags, zero-width characters), halves of surrogate pairs, line and paragraph separators.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_KEPT = frozenset("\n\t\u200c\u200d")  # the joiners belong to ordinary text in Persian, Hindi and emoji


def printable(text: str) -> str:
    r"""`text` with every character that does not show itself written as its escape, such as `\x1b` or `\u202e`.

    Line breaks, tabs and joiners stay. Text of ordinary characters is returned as it is.
    """
    if text.isprintable():
        return text
    return "".join(map(_shown, text))


def printable_json(line: str) -> str:
    r"""A JSON text on one line with the same characters written as JSON's escapes, such as `\u0085`; it reads back as before.

    They can stand in its strings alone. Two halves of a surrogate pair side by side read back as the character they make, as
    in every JSON reader.
    """
    if line.isprintable():
        return line
    return "".join(_in_json(character) if _hides(character) else character for character in line)


def _hides(character: str) -> bool:
    return character not in _KEPT and unicodedata.category(character) in _HIDDEN


def _shown(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii") if _hides(character) else character


def _in_json(character: str) -> str:
    return json.dumps(character)[1:-1]  # beyond 16 bits: the two halves of its pair


class PrintableFormatter(logging.Formatter):
    """A log line, its traceback included, through `printable`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line as text."""
        return printable(super().format(record))
