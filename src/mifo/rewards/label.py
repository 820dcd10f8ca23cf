"""Bare labels: the response is the label and nothing else (the strict rule of S4).

White space around it and a thought before it do not count; letter case does, and so does anything behind it. A search for the
label in the text would take "unacceptable" for "acceptable".
"""

from __future__ import annotations

from mifo.data.extract import after_thought
from mifo.types import Verdict


def decide(gold: str, text: str) -> Verdict:
    """CORRECT or WRONG for a whole response."""
    return Verdict.CORRECT if after_thought(text).strip() == gold.strip() else Verdict.WRONG
