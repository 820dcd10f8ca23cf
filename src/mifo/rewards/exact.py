r"""Exact answers: the boxed text is the gold text once white space is made equal.

Letter case, punctuation and LaTeX count. A response without a box is wrong: there is no rule by which the rest of a
response could be its answer.
"""

from __future__ import annotations

from mifo.data.extract import gold_answer, response_answer
from mifo.types import Verdict


def decide(gold: str, text: str) -> Verdict:
    """CORRECT or WRONG for a whole response."""
    answer = response_answer(text)
    same = answer is not None and answer.split() == gold_answer(gold).split()
    return Verdict.CORRECT if same else Verdict.WRONG
