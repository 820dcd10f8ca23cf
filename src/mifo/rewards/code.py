r"""Coding answers: the last fenced Python block of a response, against tests, in a sandbox.

The reference answer (`gold`) holds the tests in one of the forms that data sets have:

    def check(candidate): ...                        with "entry_point" in JSON: {"entry_point": "f", "test": "def check..."}
    assert f(2) == 4                                 MBPP: plain text, or JSON {"test_list": [...], "test_setup_code": ""}
    {"inputs": ["3\n"], "outputs": ["6\n"]}          APPS: standard input and output; with "fn_name", arguments and a result
    [{"input": "3\n", "output": "6\n"}]              the same, case by case

The verdict comes from the process that runs the tests; the program runs in another and is called over a pipe (`inside`).
WRONG: an assertion fails, the program raises, ends, or uses up its processor time, memory or output. TIMEOUT: it waits past
the deadline. ERROR: the tests themselves cannot run here (a module they import is missing, they fail before their first
call, they pass the program a value that is not plain, they never call it).

What a program can still do: recognise inputs and return stored results, as any program can whose tests are known or few. What
is not covered: tests that look at a changed argument, at the program's printed text (but for input/output tests), or at the
type of an object that is not plain.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mifo.data.extract import after_thought
from mifo.errors import RewardError
from mifo.types import Verdict

MAX_CHARS = 200_000
"""Longest program that is run; beyond it the verdict is ERROR."""

_PYTHON = frozenset({"", "python", "python3", "py"})
_FORMS = (
    'Python code with assert or check(candidate), or JSON: {"test": ..., "entry_point": ...}, {"test_list": [...]}, '
    '{"inputs": [...], "outputs": [...]} or [{"input": ..., "output": ...}]'
)


@dataclass(frozen=True, slots=True)
class Task:
    """A program to judge by the tests in `gold`."""

    gold: str
    program: str

    @property
    def key(self) -> str:
        """What stands for it in a cache."""
        return hashlib.sha256(json.dumps([self.gold, self.program]).encode("ascii")).hexdigest()

    @property
    def job(self) -> dict[str, Any]:
        """What the sandbox takes."""
        return {"program": self.program, **parse_tests(self.gold)}


def program_of(response: str) -> str | None:
    """The last closed fenced block marked as Python or not marked at all, after the last thought; None without one.

    A block that never closes was cut off and is no answer. Linear in the length.
    """
    block: list[str] | None = None
    found, marked = None, ""
    for line in after_thought(response).splitlines():
        text = line.strip()
        if block is None:
            if text.startswith("```"):
                block, marked = [], text.lstrip("`").strip().lower()
        elif text.startswith("```") and not text.strip("`"):
            found = "\n".join(block) if marked in _PYTHON else found
            block = None
        else:
            block.append(line)
    return found


def parse_tests(gold: str) -> dict[str, Any]:
    """Tests as `inside.checker` takes them. Raises RewardError when the text is none of the forms above."""
    text = gold.strip()
    if text[:1] not in ("{", "["):
        return _code_tests({"test": gold})
    try:
        tests = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _unreadable(gold, f"it begins like JSON and is none ({error})") from error
    if isinstance(tests, list):
        if tests and all(isinstance(test, str) for test in tests):
            return _code_tests({"test_list": tests})
        return _case_tests(_cases_of_list(gold, tests), None)
    if "inputs" in tests:
        return _case_tests(_cases_of_columns(gold, tests), tests.get("fn_name"))
    if not isinstance(tests.get("test", tests.get("test_list")), (str, list)):
        raise _unreadable(gold, "it has neither test nor test_list nor inputs")
    return _code_tests(tests)


def _code_tests(tests: Mapping[str, Any]) -> dict[str, Any]:
    code = tests["test"] if "test" in tests else "\n".join(map(str, tests["test_list"]))
    setup = "\n".join(str(tests[name]) for name in ("setup", "test_setup_code") if tests.get(name))
    return {"setup": setup, "test": str(code), "entry_point": tests.get("entry_point"), "cases": None}


def _case_tests(cases: list[list[Any]], function: str | None) -> dict[str, Any]:
    return {"setup": "", "test": "", "entry_point": function, "cases": cases}


def _cases_of_columns(gold: str, tests: Mapping[str, Any]) -> list[list[Any]]:
    inputs, outputs = tests["inputs"], tests.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs) or not inputs:
        raise _unreadable(gold, "inputs and outputs are not two lists of the same length")
    if tests.get("fn_name"):
        if not all(isinstance(arguments, list) for arguments in inputs):
            raise _unreadable(gold, "with fn_name, each of inputs is a list of arguments")
        return [[arguments, expected] for arguments, expected in zip(inputs, outputs, strict=True)]
    return [[_lines(given), _lines(expected)] for given, expected in zip(inputs, outputs, strict=True)]


def _cases_of_list(gold: str, tests: list[Any]) -> list[list[Any]]:
    if not tests or not all(isinstance(test, dict) and {"input", "output"} <= test.keys() for test in tests):
        raise _unreadable(gold, "a list of tests holds asserts, or objects with input and output")
    return [[_lines(test["input"]), _lines(test["output"])] for test in tests]


def _lines(text: Any) -> str:
    """APPS has some texts as lists of lines."""
    return "\n".join(map(str, text)) if isinstance(text, list) else str(text)


def _unreadable(gold: str, why: str) -> RewardError:
    return RewardError(f"answer = {gold[:200]!r}: no tests that the grader 'code' can read: {why}. Give {_FORMS}.")


def decide(gold: str, response: str) -> Verdict | Task:
    """WRONG without a program, else what a sandbox must judge. Raises RewardError for unreadable tests."""
    parse_tests(gold)
    program = program_of(response)
    if program is None:
        return Verdict.WRONG
    return Verdict.ERROR if len(program) > MAX_CHARS else Task(gold, program)
