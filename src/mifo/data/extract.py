r"""Where the final answer of a response is, as pure text work: nothing here knows what an answer means.

A response answers with the last complete `\boxed{...}` or `\fbox{...}` after the last `</think>`. A box whose brace
never closes is not an answer, so a response cut off in its box is wrong rather than guessed at. Every function is
linear in the length of the text, whatever the text.

Not covered: answers outside a box ("the answer is 5"), and several boxes as one answer; only the last one counts.
"""

from __future__ import annotations

import re

END_OF_THOUGHT = "</think>"
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
# An escaped character is consumed with its backslash, so that \{ and \} are not taken for braces.
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
# `\boxed 5`, as some solutions of MATH have it: a number, a command or one letter. A word would be prose about boxes.
_BARE = re.compile(r"[+-]?(?:\.?[0-9][^\s$]{0,99}|\\[A-Za-z][^\s$]{0,99}|[A-Za-z](?![A-Za-z]))")


def after_thought(text: str) -> str:
    """The text after the last `</think>`, or all of it when there is none."""
    return text.rpartition(END_OF_THOUGHT)[2]


def last_boxed(text: str) -> str | None:
    r"""Content of the last complete box, stripped; None when there is none. An empty box is the answer ""."""
    starts = [match.end() for match in _BOX.finditer(text)]
    if not starts:
        return None
    closing = _closing_braces(text, starts[0])
    for start in reversed(starts):
        content = _box_content(text, start, closing)
        if content is not None:
            return content.strip()
    return None


def _closing_braces(text: str, start: int) -> dict[int, int]:
    """Position of every opening brace from `start` on -> position of the brace that closes it."""
    opened: list[int] = []
    closing: dict[int, int] = {}
    for match in _BRACE.finditer(text, start):
        brace = match[0]
        if brace == "{":
            opened.append(match.start())
        elif brace == "}" and opened:
            closing[opened.pop()] = match.start()
    return closing


def _box_content(text: str, start: int, closing: dict[int, int]) -> str | None:
    while start < len(text) and text[start] in " \t\n":
        start += 1
    if text[start : start + 1] == "{":
        end = closing.get(start)
        return None if end is None else text[start + 1 : end]
    bare = _BARE.match(text, start)
    return bare[0].rstrip(".,;:!?)") if bare else None


def gsm8k_answer(text: str) -> str | None:
    """What follows the last `####` on its line, as GSM8K writes it (`#### 18`); None when there is no such mark."""
    _, mark, rest = text.rpartition("####")
    return (rest.partition("\n")[0].strip() or None) if mark else None


def response_answer(text: str) -> str | None:
    """The boxed answer of a model's response, or None: no box, no answer."""
    return last_boxed(after_thought(text))


def solution_answer(text: str) -> str | None:
    r"""The answer of a written solution: its last box (MATH), else its last `####` line (GSM8K), else None."""
    visible = after_thought(text)
    boxed = last_boxed(visible)
    return gsm8k_answer(visible) if boxed is None else boxed


def gold_answer(text: str) -> str:
    """The bare reference answer of a gold field, which may hold just the answer or a whole solution."""
    found = solution_answer(text)
    return text.strip() if found is None else found
