"""HumanEval's and MBPP's rows as problems whose own solutions pass their tests."""

import json

import pytest

from mifo.data.problems import load_problems
from mifo.data.rows import RowError, RowOptions, problem_from_row, schema_of
from mifo.rewards.code import Task, decide, parse_tests, program_of
from mifo.rewards.sandbox import Sandbox
from mifo.types import Verdict

HUMANEVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'import math\n\n\ndef half(x: float) -> float:\n    """Half of x."""\n',
    "canonical_solution": "    return x / 2\n",
    "entry_point": "half",
    "test": "def check(candidate):\n    assert math.isclose(candidate(3), 1.5)\n    assert candidate(0) == 0\n",
}
MBPP = {
    "task_id": 11,
    "text": "Write a function that doubles.",
    "code": "def double(x):\r\n  return 2 * x",
    "test_list": ["assert double(2) == 4", "assert double(math.inf) == math.inf"],
    "test_setup_code": "import math",
}
MBPP_PLUS = {
    "task_id": 11,
    "prompt": "Write a function that doubles.",
    "code": "def double(x):\n    return 2 * x",
    "test_imports": ["import math"],
    "test_list": ["assert double(2) == 4"],
    "test": "inputs, results = [[1], [2]], [2, 4]\nfor x, result in zip(inputs, results):\n    assert double(*x) == result\n",
}


@pytest.mark.parametrize("row", [HUMANEVAL, MBPP, MBPP_PLUS])
def test_a_row_becomes_a_problem_that_its_solution_solves(row):
    assert schema_of(row.keys()) == "coding"
    problem = problem_from_row(row, "coding", RowOptions(box_answer=True))
    assert problem.grader == "code"
    assert "boxed" not in problem.demonstration
    sandbox = Sandbox(seconds_per_answer=20.0, memory_mib=512, unsafe=True)
    task = decide(problem.answer, problem.demonstration)
    assert isinstance(task, Task)
    assert sandbox.judge(task.job).verdict is Verdict.CORRECT
    wrong = task.program.replace("2", "3")
    assert sandbox.judge(Task(problem.answer, wrong).job).verdict is Verdict.WRONG


def test_the_prompt_shows_what_the_data_sets_show():
    human, mbpp = (problem_from_row(row, "coding") for row in (HUMANEVAL, MBPP))
    assert 'def half(x: float) -> float:\n    """Half of x."""' in human.messages[0].content
    assert "isclose" not in human.messages[0].content
    assert "assert double(2) == 4" in mbpp.messages[0].content
    assert program_of(human.demonstration).endswith("return x / 2")
    assert parse_tests(human.answer)["entry_point"] == "half"


@pytest.mark.parametrize("missing", ["test", "prompt"])
def test_a_row_without_tests_or_prompt_is_counted(missing):
    with pytest.raises(RowError, match=missing):
        problem_from_row({**HUMANEVAL, missing: None}, "coding")
    with pytest.raises(RowError, match="test_list"):
        problem_from_row({**MBPP, "test_list": []}, "coding")


def test_a_file_of_them_is_read(tmp_path):
    path = tmp_path / "humaneval.jsonl"
    path.write_text(json.dumps(HUMANEVAL) + "\n")
    report = load_problems(str(path), verify=lambda rows: [Verdict.CORRECT] * len(rows))
    assert report.schema == "coding"
    assert report.problems[0].demonstration
