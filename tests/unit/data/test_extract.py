r"""Where the answer of a response is: hand-made texts, and texts made to be slow."""

import time

import pytest

from mifo.data.extract import gold_answer, gsm8k_answer, last_boxed, response_answer, solution_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{5}", "5"),
        (r"so \boxed{3}, no, \boxed{204}.", "204"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\fbox{7}", "7"),
        (r"\boxed {7}", "7"),
        ("\\boxed\n{ 7 }", "7"),
        (r"$\boxed 5$", "5"),
        (r"$\boxed5$ units", "5"),
        (r"$\boxed \frac12$", r"\frac12"),
        (r"$\boxed x$.", "x"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{a \} b}", r"a \} b"),
        (r"\boxed{x = \boxed{5}}", "5"),
        (r"\boxed{}", ""),
        (r"203 \boxed{}", ""),
        (r"\boxed{5} put it in \boxed please", "5"),  # a word after it is prose, not an answer
        (r"\boxedx{5}", None),
        (r"\boxed{\frac{1}{2}", None),  # never closes
        (r"\boxed{5} then \boxed{6", "5"),
        (r"{ \boxed{5} {{", "5"),
        (r"}} \boxed{5}", "5"),
        ("the answer is 5", None),
        ("", None),
    ],
)
def test_last_boxed(text, answer):
    assert last_boxed(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"<think>\boxed{1}</think> \boxed{2}", "2"),
        (r"<think>\boxed{1}</think> nothing", None),  # thoughts are not the answer
        (r"\boxed{1}</think>\boxed{2}</think>\boxed{3}", "3"),
        (r"no tags \boxed{4}", "4"),
        ("#### 18", None),  # a response answers in a box
    ],
)
def test_response_answer(text, answer):
    assert response_answer(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("16 - 3 = 13\n#### 18", "18"),
        ("#### 1\n#### 1,234\n", "1,234"),
        ("####18\nbye", "18"),
        ("####", None),
        ("none", None),
    ],
)
def test_gsm8k_answer(text, answer):
    assert gsm8k_answer(text) == answer


def test_a_box_wins_over_the_gsm8k_mark_and_a_bare_gold_is_itself():
    assert solution_answer("\\boxed{5}\n#### 6") == "5"
    assert gold_answer(" 7 ") == "7"
    assert gold_answer("a = 7\n#### 7") == "7"
    assert gold_answer(r"thus $\boxed{7}$") == "7"


@pytest.mark.parametrize("unit", ["\\boxed", "\\boxed{", "\\boxed{}", "{", "}", "\\boxed{{", "#### ", "\\", " "])
def test_a_megabyte_takes_linear_time(unit):
    text = unit * (1_000_000 // len(unit))
    start = time.process_time()
    last_boxed("\\boxed{1}" + text)
    solution_answer(text)
    assert time.process_time() - start < 3.0  # quadratic work on this text takes minutes
