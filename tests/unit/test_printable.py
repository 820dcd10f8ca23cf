"""What of a text reaches the terminal as it is, and what as its escape."""

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mifo.printable import PrintableFormatter, printable, printable_json


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


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("ünïcode, 中文, 𝟓 and 🎉", "ünïcode, 中文, 𝟓 and 🎉"),
        ("a\n\tb\x1b", "a\\n\\tb\\u001b"),
        ("\x7f\x80\x85\x9b31m", "\\u007f\\u0080\\u0085\\u009b31m"),
        ("\u202eevil\u202c\u2066\u2028", "\\u202eevil\\u202c\\u2066\\u2028"),
        ("\ufeff\u200b\xad", "\\ufeff\\u200b\\u00ad"),
        ("\U000e0041", "\\udb40\\udc41"),
        ("\ud800 \udfff", "\\ud800 \\udfff"),
        ("\U0001f468\u200d\U0001f469", "\U0001f468\u200d\U0001f469"),
        ("\\u202e", "\\\\u202e"),
    ],
)
def test_json_by_hand(text, written):
    line = printable_json(json.dumps(text, ensure_ascii=False))
    assert line == f'"{written}"'
    assert json.loads(line) == text
    line.encode("utf-8")


anything = st.text(st.characters(codec=None, categories=None), max_size=20)


@given(st.recursive(anything, lambda inner: st.lists(inner) | st.dictionaries(anything, inner), max_leaves=6))
def test_json_reads_back_and_hides_nothing(value):
    plain = json.dumps(value, ensure_ascii=False)
    line = printable_json(plain)
    assert json.loads(line) == json.loads(plain)  # where halves of a pair meet, every JSON reader joins them
    assert printable(line) == line
    line.encode("utf-8")


def test_log_lines_and_their_tracebacks():
    try:
        raise ValueError("\x1b[31mred")
    except ValueError as error:
        record = logging.LogRecord("x", logging.INFO, "", 0, "%s", ("\u202e",), (ValueError, error, None))
    line = PrintableFormatter("%(message)s").format(record)
    assert line.startswith("\\u202e\n")
    assert line.endswith("\\x1b[31mred")
