"""Coding problems as HumanEval(+) and MBPP(+) have them, as a problem with tests for the grader `code`.

    HumanEval   `prompt` (a signature with its docstring), `test` (a function check), `entry_point`, `canonical_solution`
    MBPP        `text` or `prompt`, `test_list` (asserts), `test_setup_code` or `test_imports`, `code`; MBPP+ adds `test`

MBPP's asserts are part of its prompt, as in its paper: they say what the function is called. So a program can know them.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from mifo.types import Message

_ASK = "Answer with the whole program in one ```python block."


def is_coding(columns: Collection[str]) -> bool:
    """Whether a file with these columns holds coding problems."""
    return {"prompt", "entry_point", "test"} <= set(columns) or "test_list" in columns


def coding_problem(row: Mapping[str, Any]) -> tuple[tuple[Message, ...], str, str | None]:
    """Turns, tests and demonstration of a row. Raises KeyError for a column that is missing, TypeError for no text."""
    if row.get("entry_point"):
        prompt = _text(row, "prompt")
        question = f"Complete this function. {_ASK}\n\n```python\n{prompt.rstrip()}\n```"
        tests = {"setup": prompt, "test": _text(row, "test"), "entry_point": _text(row, "entry_point")}
        solution = row.get("canonical_solution")
        return (Message("user", question),), json.dumps(tests), _fenced(f"{prompt}{solution}") if solution else None
    shown = [str(test) for test in row["test_list"]]
    if not shown:
        raise KeyError("test_list")
    question = f"{_text(row, 'text' if row.get('text') else 'prompt')}\n\nIt must pass these tests:\n\n" + "\n".join(
        shown
    )
    imports = row.get("test_imports") or []
    tests = {"setup": "\n".join([*map(str, imports), row.get("test_setup_code") or ""]).strip()}
    tests["test"] = row["test"] if isinstance(row.get("test"), str) else "\n".join(shown)
    code = row.get("code")
    return (Message("user", f"{question}\n\n{_ASK}"),), json.dumps(tests), _fenced(str(code)) if code else None


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise TypeError(name)
    return value


def _fenced(program: str) -> str:
    return f"```python\n{program.strip()}\n```"
