"""Text from outside, made fit for a terminal.

What a model writes, and what data, model and configuration files hold, may carry escape sequences that recolour, retitle or
rewrite a terminal, and marks that reorder what is read (CVE-2021-42574). Nothing of it is shown raw.
"""

from __future__ import annotations

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


def _shown(character: str) -> str:
    if character in _KEPT or unicodedata.category(character) not in _HIDDEN:
        return character
    return character.encode("unicode_escape").decode("ascii")


class PrintableFormatter(logging.Formatter):
    """A log line, its traceback included, through `printable`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line as text."""
        return printable(super().format(record))
