r"""What exact rules decide about mathematical answers, and what they leave to a worker."""

import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mifo.rewards.math import MAX_CHARS, Comparison, decide
from mifo.rewards.numbers import parse_number
from mifo.rewards.spelling import normalise
from mifo.types import Verdict

CORRECT = [
    ("5", "5"),
    ("5", "5."),
    ("5", "$5$"),
    ("5", r"\$5"),
    ("5", "+5"),
    ("-5", "−5"),
    ("-5", "- 5"),
    ("70", "070"),
    ("70", "70.0"),
    ("025", "25"),
    ("0.1", ".1"),
    ("0", "-0"),
    ("1,000", "1000"),
    ("1{,}234{,}567", "1,234,567"),
    (r"11,\! 111,\! 111,\! 100", "11111111100"),
    (r"1\,000", "1000"),
    (r"\frac{1}{2}", "0.5"),
    (r"\frac{1}{2}", r"\dfrac{2}{4}"),
    (r"\frac12", "1/2"),
    (r"-\frac{1}{2}", r"\frac{-1}{2}"),
    (r"\frac1{20}", "0.05"),
    (r"1.5\times 10^{3}", "1500"),
    (r"10000000000", "1e10"),
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\dfrac{\pi}{2})"),
    ("p - q", "p-q"),
    (r"\text{13}", "13"),
    (r"\text{Evelyn}", "evelyn"),
    (r"\text{(C)}", "C"),
    ("C", r"\text{(C)}"),
    ("C", "C) 5"),
    (r"90^\circ", "90"),
    (r"90^{\circ}", r"90\text{ degrees}"),
    ("25", "25 degrees"),
    ("36", r"36 \text{ ways}"),
    (r"5\text{ cm}", "5"),
    (r"5\text{ cm}", r"5\text{ centimeters}"),
    (r"5\text{ cm}^2", r"5\text{ square centimeters}"),
    (r"1\text{ m}", r"100\text{ cm}"),
    (r"50\%", "50"),
    (r"50\%", "0.5"),
    (r"\frac{7}{20}", r"35\%"),
    ("5", "x=5"),
    ("x=5", "5"),
    ("5", r"x \in 5"),
    ("5", r"\text{Area} = 5"),
    ("10", "x + y = 10"),
    ("5", "x = 5 = 5.0"),
    ("1,2", "x=1, y=2"),
    ("1234", "x=1,234"),
    ("[-2,7]", r"x \in [-2,7]"),
    ("y=2x+3", "2x + 3"),
    ("4210_5", "4210"),
    ("4210_{5}", "4210_5"),
    ("7/2", "3 1/2"),
    ("-3.5", "-3 1/2"),
    (r"\frac{1}{6}", r"0.1\overline{6}"),
    (r"0.\overline{9}", "1"),
    (r"-\frac{1}{3}", r"-.\bar{3}"),
    ("73", "**73**"),
    ("1,2", r"x=1 \text{ or } x=2"),
    ("1,2,3", "1, 2, and 3"),
    ("6:30", "6{:}30"),
    (r"\emptyset", r"\varnothing"),
]
WRONG = [
    ("5", "6"),
    ("5", "-5"),
    ("5", ""),
    ("1234", "12345"),
    ("123456789", "123456788"),
    (r"\frac{1}{3}", "0.33333333"),
    ("0.0000001", "0.0000002"),
    (r"\frac{1}{1000000}", r"\frac{1}{1000001}"),
    ("204", "5=204"),
    ("204", "x=203=204"),
    ("5", "2x=10"),
    ("204", "{5=204}"),
    ("1,2", "5=1,7=2"),
    ("204", "="),
    ("204", "x="),
    (r"\text{east}", r"\text{west}"),
    (r"\text{Evelyn}", "5"),
    (r"5\text{ cm}", r"5\text{ m}"),
    (r"5\text{ cm}", r"5\text{ cm}^2"),
    (r"50\%", r"0.5\%"),
    ("1011_2", "1011_3"),
    ("31/2", "3 1/2"),
    ("2", "2 2/3"),
    (r"\{1,2\}", "(1,2)"),
    ("[1,2]", r"\{1,2\}"),
    ("12:00", "1:00"),
    ("2:3", "3:2"),
    ("1:2:3", "1:2"),
]
LEFT_OPEN = [
    ("5", "x"),
    ("9", "3^2"),
    ("1/0", "5"),
    ("1234", "1, 234"),  # a list, not a thousands mark
    (r"\frac{7}{2}", r"3\frac{1}{2}"),
    ("2", "2t"),  # not two of the unit t
    ("2", "2 ab"),
    ("5", r"5\text{ million}"),
    ("5", r"5\text{ or more}"),
    ("3", r"3 \text{ or } 4"),
    ("x=5", "y=5"),
    ("2x+4y=3", "x=5"),
    (r"\frac{n(n+1)}{2}", r"\sum_{k=1}^{n} k"),
    ("1" * 400, "2"),  # beyond the bound of exact arithmetic
]


@pytest.mark.parametrize(("gold", "answer"), CORRECT)
def test_decided_correct(gold, answer):
    assert decide(gold, answer) is Verdict.CORRECT


@pytest.mark.parametrize(("gold", "answer"), WRONG)
def test_decided_wrong(gold, answer):
    assert decide(gold, answer) is Verdict.WRONG


@pytest.mark.parametrize(("gold", "answer"), LEFT_OPEN)
def test_left_to_a_worker(gold, answer):
    assert isinstance(decide(gold, answer), Comparison)


def test_every_member_of_a_chain_is_asked():
    assert decide("9", "x=3^2=2+7") == Comparison("9", ("3^2", "2+7"))
    assert decide("x+1", r"x+2=x+1") == Comparison("x+1", ("x+2",))  # the gold has a variable: nothing is skipped


def test_a_long_answer_is_an_error_unless_it_is_the_gold():
    long = "1+" * MAX_CHARS
    assert decide("5", long) is Verdict.ERROR
    assert decide(long, "5") is Verdict.ERROR
    assert decide(long, long) is Verdict.CORRECT


rationals = st.fractions(max_denominator=10**6).map(lambda f: f % 10**7 - 5 * 10**6)


@st.composite
def spelled(draw, value):
    """One of the spellings of a rational number."""
    scale = draw(st.integers(1, 50))
    top, bottom = abs(value.numerator) * scale, value.denominator * scale
    sign = "-" if value < 0 else draw(st.sampled_from(["", "+"]))
    forms = [
        f"\\frac{{{top}}}{{{bottom}}}",
        f"\\dfrac {{{top}}} {{{bottom}}}",
        f"{top}/{bottom}",
        f"{top:,}/{bottom:,}",
    ]
    if bottom % value.denominator == 0 and value.denominator == 1:
        whole = abs(value.numerator)
        forms += [str(whole), f"{whole:,}", f"{whole:,}".replace(",", "{,}"), f"00{whole}", f"{whole}.0", f"{whole}."]
    tenths = value * 10**6
    if tenths.denominator == 1:
        forms.append(f"{abs(tenths.numerator) // 10**6}.{abs(tenths.numerator) % 10**6:06d}0")
    number = sign + draw(st.sampled_from(forms))
    return draw(st.sampled_from(["{}", "${}$", " {} ", "\\({}\\)", "x = {}", "{}^\\circ", "{}\\text{{ cm}}"])).format(
        number
    )


@given(st.data(), rationals)
def test_one_number_in_two_spellings_is_correct(data, value):
    assert decide(data.draw(spelled(value)), data.draw(spelled(value))) is Verdict.CORRECT


@given(st.data(), rationals, rationals)
def test_two_numbers_are_never_correct(data, left, right):
    verdict = decide(data.draw(spelled(left)), data.draw(spelled(right)))
    assert verdict is (Verdict.CORRECT if left == right else Verdict.WRONG)


@given(st.integers(1, 10**6), st.integers(-8, 8))
def test_a_near_miss_is_wrong(value, difference):
    close = Fraction(value) + Fraction(difference, 10**12)
    verdict = decide(str(value), f"{close.numerator}/{close.denominator}")
    assert verdict is (Verdict.WRONG if difference else Verdict.CORRECT)


@given(st.text(alphabet="0123456789.,/-+%\\frac{}()=x_^ $e\\!", max_size=40))
def test_any_text_gets_a_decision_and_normalising_keeps_numbers(text):
    assert decide("5", text) is not None
    number = parse_number(text)
    if number is not None:
        assert parse_number(normalise(text)) == number


BLANKS = " " * 1990


@pytest.mark.parametrize(
    "answer",
    ["9" * 2000, "1e999999999", "1e9999", "(" * 999, "=" * 1999, "x=" * 999, "_{" * 999, f"{BLANKS}x",
     f"${BLANKS}x", f"\\$1{BLANKS}x", "\\$" + "1," * 990 + "x", "\\{" + BLANKS],
)  # fmt: skip
def test_hostile_answers_are_quick(answer):
    start = time.process_time()
    assert decide("5", answer) is not Verdict.CORRECT
    assert time.process_time() - start < 0.5
