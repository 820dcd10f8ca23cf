"""Rows of the four schemas as problems, each from a row written as the field's data sets write it."""

import pytest

from mifo.data.rows import RowError, RowOptions, last_boxed, problem_from_row, schema_of
from mifo.errors import DataError
from mifo.types import Message

USER = {"role": "user", "content": "What is 2+2?"}
SYSTEM = {"role": "system", "content": "Think."}
TRACE = "<think>\nTwo and two.</think>\n\\boxed{4}"


def verl(**changes):
    row = {
        "data_source": "",
        "ability": "math",
        "prompt": [SYSTEM, USER],
        "target": [{"role": "assistant", "content": TRACE}],
        "reward_model": {"ground_truth": "4", "style": "rule"},
        "extra_info": {"index": 0, "split": "default"},
    }
    return {**row, **changes}


@pytest.mark.parametrize(
    ("columns", "schema"),
    [
        (["id", "problem", "answer", "solution"], "mifo"),
        (["question", "answer"], "mifo"),
        (["problem", "solution", "level"], "mifo"),
        (["question", "options", "answer_index"], "mifo"),
        (["prompt", "target", "reward_model", "data_source"], "verl"),
        (["prompt", "reward_model"], "verl"),
        (["prompt", "target"], "openrlhf"),
        (["prompt", "target", "answer"], "openrlhf"),
        (["prompt", "completion", "answer"], "trl"),
        (["messages", "ground_truth"], "trl"),
        (["prompt", "solution"], "trl"),
        (["task_id", "prompt", "entry_point", "canonical_solution", "test"], "coding"),
        (["task_id", "text", "code", "test_list", "test_setup_code"], "coding"),
    ],
)
def test_schemas_are_recognised_by_their_columns(columns, schema):
    assert schema_of(columns) == schema


@pytest.mark.parametrize("columns", [[], ["sentence", "label"], ["prompt", "entry_point"], ["problem"]])
def test_unknown_columns_are_listed_with_what_is_accepted(columns):
    with pytest.raises(DataError, match="accepted are mifo: problem") as caught:
        schema_of(columns)
    assert all(column in str(caught.value) for column in columns)


def test_mifo_row():
    row = {"id": "a-1", "problem": "What is 2+2?", "answer": 4, "demonstration": "So \\boxed{4}", "source": "mine"}
    problem = problem_from_row(row, "mifo")
    assert problem.messages == (Message("user", "What is 2+2?"),)
    assert (problem.id, problem.answer, problem.source, problem.grader) == ("a-1", "4", "mine", "math")
    assert problem.demonstration == "So \\boxed{4}"


def test_gsm8k_row_gives_the_answer_and_a_boxed_demonstration_without_calculator_marks():
    solution = "She sold 48/2 = <<48/2=24>>24.\nIn all 2,424 = <<48+24=2424>>2,424.\n#### 2,424"
    problem = problem_from_row({"question": "How many?", "answer": solution}, "mifo")
    assert problem.answer == "2424"
    assert problem.demonstration == "She sold 48/2 = 24.\nIn all 2,424 = 2,424.\n\\boxed{2424}"
    both = problem_from_row({"problem": "How many?", "answer": "2424", "solution": solution}, "mifo")
    assert both.demonstration == problem.demonstration


def test_math_row_takes_the_answer_from_the_last_box_of_the_solution():
    solution = "First \\boxed{1}; then \\boxed{\\frac{\\{a\\}}{2}}."
    problem = problem_from_row({"problem": "P", "solution": solution}, "mifo")
    assert problem.answer == "\\frac{\\{a\\}}{2}"  # a regex up to the first brace would give "\\frac{\\{a"
    assert problem.demonstration == solution


@pytest.mark.parametrize(
    ("text", "boxed"),
    [
        ("\\boxed{3}", "3"),
        ("\\boxed{ a } and \\fbox{b}", "b"),
        ("\\boxed{1} then \\boxed{2", "1"),  # the last one was cut off
        ("\\boxed{\\boxed{5}}", "5"),
        ("boxed{3}", None),
        ("", None),
    ],
)
def test_last_boxed(text, boxed):
    assert last_boxed(text) == boxed


def test_box_answer_boxes_only_a_demonstration_without_a_box():
    row = {"problem": "P", "answer": "72", "solution": "It is 72."}
    assert problem_from_row(row, "mifo").demonstration == "It is 72."
    boxed = RowOptions(box_answer=True)
    assert problem_from_row(row, "mifo", boxed).demonstration == "It is 72.\n\\boxed{72}"
    wrong = {**row, "solution": "It is \\boxed{71}."}
    assert problem_from_row(wrong, "mifo", boxed).demonstration == "It is \\boxed{71}."


@pytest.mark.parametrize(
    "row",
    [
        {"question": "Q", "options": ["x", "y", "z"], "answer": "C"},
        {"question": "Q", "options": ["x", "y", "z"], "answer": "C", "answer_index": 2},
        {"question": "Q", "choices": ["x", "y", "z"], "answer": 2},
        {"question": "Q", "choices": ["x", "y", "z"], "answer": "z"},
        {"question": "Q", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "3"},
    ],
)
def test_multiple_choice_in_all_its_spellings(row):
    problem = problem_from_row(row, "mifo")
    assert (problem.answer, problem.grader) == ("C", "choice")
    assert problem.messages[0].content == "Q\nA. x\nB. y\nC. z\nAnswer with the letter in \\boxed{}."


def test_an_index_settles_a_letter_that_is_also_an_option():
    row = {"question": "Which blood type?", "options": ["C", "B", "A"], "answer": "A", "answer_index": 0}
    assert problem_from_row(row, "mifo").answer == "A"
    assert problem_from_row({**row, "answer_index": 2}, "mifo").answer == "C"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"answer": "B", "answer_index": 2}, "answer columns disagree"),
        ({"answer": "D"}, "answer names no option"),
        ({"answer": -1}, "answer names no option"),
        ({"answer": 1.0}, "answer names no option"),
        ({"options": ["C", "y", "z"]}, "answer names two options"),
        ({"options": ["x"]}, "options are not a list of 2 to 26 texts"),
        ({"answer": None}, "no answer"),
    ],
)
def test_multiple_choice_that_cannot_be_graded(changes, reason):
    with pytest.raises(RowError, match=f"^{reason}$"):
        problem_from_row({"question": "Q", "options": ["x", "y", "z"], "answer": "C", **changes}, "mifo")


def test_verl_row_keeps_the_system_turn_and_drops_the_leading_think():
    problem = problem_from_row(verl(), "verl", RowOptions(default_source="openr1"))
    assert problem.messages == (Message("system", "Think."), Message("user", "What is 2+2?"))
    assert (problem.answer, problem.source) == ("4", "openr1")
    assert problem.demonstration == "Two and two.</think>\n\\boxed{4}"
    assert problem_from_row(verl(), "verl", RowOptions(strip_think=False)).demonstration == TRACE
    assert problem_from_row(verl(target=None), "verl").demonstration is None
    assert problem_from_row(verl(data_source="aime"), "verl").source == "aime"


def test_verl_ids_come_from_the_content_since_the_index_restarts():
    other = verl(prompt=[{"role": "user", "content": "What is 3+3?"}])
    assert problem_from_row(other, "verl").id != problem_from_row(verl(), "verl").id
    repeated = verl(extra_info={"index": 9, "split": "default"})  # avg@32 files repeat the row with another index
    assert problem_from_row(repeated, "verl").id == problem_from_row(verl(), "verl").id


def test_a_letter_answer_is_graded_as_choice_only_when_the_prompt_lists_options():
    listed = [{"role": "user", "content": "Which?\nA. one\nB. two\nC) three\nD. four"}]
    truth = {"ground_truth": "C"}
    assert problem_from_row(verl(prompt=listed, reward_model=truth), "verl").grader == "choice"
    assert problem_from_row(verl(reward_model=truth), "verl").grader == "math"


@pytest.mark.parametrize(
    ("row", "schema"),
    [
        ({"prompt": "What is 2+2?", "completion": "So \\boxed{4}", "answer": "4"}, "trl"),
        ({"prompt": [USER], "completion": [{"role": "assistant", "content": "So \\boxed{4}"}], "solution": "4"}, "trl"),
        ({"messages": [USER, {"role": "assistant", "content": "So \\boxed{4}"}], "ground_truth": 4}, "trl"),
        ({"messages": [USER, {"role": "assistant", "content": "So \\boxed{4}"}]}, "trl"),
        ({"prompt": [USER], "target": [{"role": "assistant", "content": "So \\boxed{4}"}]}, "openrlhf"),
        ({"prompt": "What is 2+2?", "target": "So \\boxed{4}", "answer": "4"}, "openrlhf"),
    ],
)
def test_trl_and_openrlhf_rows_are_the_same_problem(row, schema):
    problem = problem_from_row(row, schema)
    assert problem.messages == (Message("user", "What is 2+2?"),)
    assert problem.answer == "4"
    assert problem.demonstration == "So \\boxed{4}"


def test_prompt_only_with_a_boxed_solution_column_is_an_answer():
    problem = problem_from_row({"prompt": "P", "solution": "$\\boxed{\\frac12}$"}, "trl")
    assert (problem.answer, problem.demonstration) == ("\\frac12", None)


@pytest.mark.parametrize(
    ("row", "schema", "reason"),
    [
        ({"problem": "  ", "answer": "4"}, "mifo", "empty prompt"),
        ({"problem": "2+2", "answer": "4", "demonstration": {"a": 1}}, "mifo", "demonstration is no text"),
        ({"problem": "P", "answer": None}, "mifo", "no answer"),
        ({"problem": "P", "answer": float("nan")}, "mifo", "no answer"),
        ({"problem": "P", "answer": ["1", "2"]}, "mifo", "no answer"),
        ({"problem": "P", "answer": "1", "grader": "oracle"}, "mifo", "unknown grader"),
        (verl(prompt=[]), "verl", "empty prompt"),
        (verl(prompt=[{"role": "user", "content": " "}]), "verl", "empty prompt"),
        (verl(prompt=[USER, {"role": "assistant", "content": "4"}]), "verl", "last turn is not the user's"),
        (verl(prompt=[{"role": "tool", "content": "4"}]), "verl", "a turn's role is not system, user or assistant"),
        (verl(prompt=[{"role": "user", "content": [{"type": "image"}]}]), "verl", "a turn lacks role or text content"),
        (verl(prompt=7), "verl", "prompt is neither text nor a list of turns"),
        (verl(reward_model=None), "verl", "no answer"),
        (verl(target=[USER]), "verl", "the response's last turn is not the assistant's"),
        ({"prompt": "P", "target": "no box"}, "openrlhf", "no answer"),
    ],
)
def test_rows_without_a_usable_problem_say_why(row, schema, reason):
    with pytest.raises(RowError, match=f"^{reason}$"):
        problem_from_row(row, schema)
