r"""Multiple choice: the letter in the last box, else the last "ANSWER: X" of the response.

Both are in use: some data sets ask for \boxed{C}, GPQA's prompts for a last line "ANSWER: C". A box that holds no
letter is a wrong answer even if a line "ANSWER: C" follows, since the box is what was asked to hold the answer. The
text of an option without its letter, and two letters, are wrong.
"""

from __future__ import annotations

import re

from mifo.data.extract import after_thought, gold_answer, last_boxed
from mifo.errors import RewardError
from mifo.types import Verdict

_COMMANDS = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathsf|bf|rm)(?![A-Za-z])|\\[ ,;:!]|[${}*\s]")
_ANSWER = re.compile(r"answer\**[ \t]*:[ \t]*([^\n]{1,80})", re.IGNORECASE)
# The letter alone, or set off from what follows it: "C", "(C)", "C) 5", "C. 5", "C: five".
_LETTER = re.compile(r"\(?([A-Za-z])(?:\)(?!\()[^()]*|[.:].*)?", re.DOTALL)
_MAX_CHARS = 2000


def letter_of(text: str) -> str | None:
    """The upper-case letter that an answer names, or None."""
    bare = _COMMANDS.sub("", text[:_MAX_CHARS])
    match = _LETTER.fullmatch(bare)
    return match[1].upper() if match else None


def answered_letter(text: str) -> str | None:
    """The letter a whole response answers with: that of its box, else of its last "ANSWER: X"; None for no letter."""
    visible = after_thought(text)
    boxed = last_boxed(visible)
    if boxed is not None:
        return letter_of(boxed)
    lines = _ANSWER.findall(visible)
    return letter_of(lines[-1]) if lines else None


def decide(gold: str, text: str) -> Verdict:
    """CORRECT or WRONG for a whole response. Raises RewardError when the gold names no letter."""
    wanted = letter_of(gold_answer(gold))
    if wanted is None:
        raise RewardError(
            f"answer = {gold!r}: the choice grader needs one letter such as 'C' or '(C)'; give the letter of the right "
            "option, or grade this problem with grader = 'exact' or 'math'"
        )
    return Verdict.CORRECT if answered_letter(text) == wanted else Verdict.WRONG
