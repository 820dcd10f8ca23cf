"""What of a text reaches the terminal as it is, and what as its escape."""

import logging

import pytest

from mifo.printable import PrintableFormatter, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain text, ünïcode, 中文, 𝟓 and 🎉", "plain text, ünïcode, 中文, 𝟓 and 🎉"),
        ("a\n\tb", "a\n\tb"),
        ("\x1b[31mred", "\\x1b[31mred"),
        ("\x9b31m", "\\x9b31m"),
        ("line\rover", "line\\rover"),
        ("a\x00\x08\x7f", "a\\x00\\x08\\x7f"),
        ("\u202eevil\u202c", "\\u202eevil\\u202c"),
        ("\u2066a\u2069\u200e\u200b\ufeff", "\\u2066a\\u2069\\u200e\\u200b\\ufeff"),
        ("a\u2028b\u2029c\x85", "a\\u2028b\\u2029c\\x85"),
        ("\U000e0041", "\\U000e0041"),
        ("\ud800", "\\ud800"),
        ("\U0001f468\u200d\U0001f469", "\U0001f468\u200d\U0001f469"),
        ("\\x1b", "\\x1b"),
    ],
)
def test_by_hand(text, shown):
    assert printable(text) == shown
    assert printable(shown) == shown
    shown.encode("utf-8")


def test_log_lines_and_their_tracebacks():
    try:
        raise ValueError("\x1b[31mred")
    except ValueError as error:
        record = logging.LogRecord("x", logging.INFO, "", 0, "%s", ("\u202e",), (ValueError, error, None))
    line = PrintableFormatter("%(message)s").format(record)
    assert line.startswith("\\u202e\n")
    assert line.endswith("\\x1b[31mred")
