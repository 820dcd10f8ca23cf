r"""Multiple choice and exact answers."""

import pytest

from mifo.errors import RewardError
from mifo.rewards import choice, exact
from mifo.types import Verdict


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (r"\boxed{C}", "C"),
        (r"\boxed{\text{(C)}}", "C"),
        (r"\boxed{\textbf{(C) }5}", "C"),
        (r"\boxed{C) 5}", "C"),
        (r"\boxed{C. five}", "C"),
        (r"\boxed{C: five}", "C"),
        (r"\boxed{c}", "C"),
        (r"\boxed{$\mathrm{C}$}", "C"),
        ("ANSWER: C", "C"),
        ("ANSWER: $C$", "C"),
        ("**ANSWER:** C", "C"),
        ("Answer: (C).", "C"),
        ("ANSWER: A\nno, wait.\nANSWER: C", "C"),
        ("ANSWER: A \\boxed{C}", "C"),
        ("\\boxed{C}\nANSWER: A", "C"),  # the box wins wherever it stands
        (r"\boxed{5}" + "\nANSWER: C", None),  # also when it holds no letter
        ("<think>ANSWER: A</think> ANSWER: C", "C"),
        (r"<think>\boxed{A}</think> ANSWER: C", "C"),
        (r"\boxed{C, D}", None),
        (r"\boxed{(C)(D)}", None),
        (r"\boxed{CD}", None),
        (r"\boxed{A boat}", None),
        (r"\boxed{}", None),
        ("ANSWER: five", None),
        ("C", None),
        ("", None),
    ],
)
def test_answered_letter(text, letter):
    assert choice.answered_letter(text) == letter


@pytest.mark.parametrize("gold", ["C", "c", "(C)", r"\text{(C)}", r"\boxed{C}", "C) five"])
def test_a_gold_letter_in_any_spelling(gold):
    assert choice.decide(gold, r"\boxed{C}") is Verdict.CORRECT
    assert choice.decide(gold, r"\boxed{B}") is Verdict.WRONG


@pytest.mark.parametrize("gold", ["five", "2", "AB"])
def test_a_gold_that_is_no_letter_is_the_users_error(gold):
    with pytest.raises(RewardError, match="one letter"):
        choice.decide(gold, r"\boxed{C}")


@pytest.mark.parametrize(
    ("gold", "text", "correct"),
    [
        ("a b", "\\boxed{ a \n b }", True),
        ("a b", r"\boxed{ab}", False),
        ("a b", r"\boxed{A b}", False),
        ("5", r"\boxed{5.0}", False),
        ("5", "5", False),  # no box, no answer
        ("5", r"\boxed{5}</think>6", False),
    ],
)
def test_exact(gold, text, correct):
    assert exact.decide(gold, text) is (Verdict.CORRECT if correct else Verdict.WRONG)
