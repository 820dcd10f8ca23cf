"""One row of a data file, in any of six schemas, as a problem. Pure functions: no files, no tokenizer, no verifier.

    mifo     `problem | question` with `answer`, and `demonstration | solution` where there is one; GSM8K's
             `question, answer` with `#### 18`, MATH's `problem, solution` with a box, and multiple choice with
             `options | choices` belong here
    verl     `prompt` (turns), `reward_model.ground_truth`, `target` (turns or null), `data_source`
    openrlhf `prompt`, `target` (turns or text), answer from a column or from the target's box
    labels   `sentence | text` and `label`, where labels are configured: the question asks for the label, which is the answer
    coding   HumanEval's and MBPP's columns: see `coding`
    trl      `prompt, completion` or `messages`, with `answer | ground_truth | solution`; prompt-only is fine

A demonstration found here is not verified yet; `problems.load_problems` does that.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from mifo.data.coding import coding_problem, is_coding
from mifo.data.extract import last_boxed
from mifo.data.labelled import TEXT_COLUMNS, LabelTask, text_and_label
from mifo.errors import DataError
from mifo.types import GraderName, Message, Problem

Schema = Literal["mifo", "verl", "trl", "openrlhf", "coding", "labels"]
Row = Mapping[str, Any]

ACCEPTED = (
    "mifo: problem|question + answer (or a solution with \\boxed{}), optional demonstration|solution, options|choices; "
    "verl: prompt + reward_model.ground_truth, optional target; "
    "openrlhf: prompt + target; "
    "trl: prompt (+ completion) or messages, + answer|ground_truth|solution; "
    "coding: prompt + entry_point + test (HumanEval), or test_list (MBPP); "
    "labels: sentence|text + label, where data.labels names the labels"
)
THINK = "<think>\n"
_QUESTION = ("problem", "question")
_ANSWER = ("answer", "ground_truth", "answerKey")
_DEMONSTRATION = ("demonstration", "solution")
_OPTIONS = ("options", "choices")
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_CALCULATOR = re.compile(r"<<[^<>]*>>")
_GSM8K = re.compile(r"\n?####\s*(\S[^\n]*?)\s*$")
_THOUSANDS = re.compile(r"-?\d{1,3}(,\d{3})+(\.\d+)?")


class RowError(ValueError):
    """A row that cannot be used; its text is the reason under which the row is counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowOptions:
    """How rows are read, besides their schema: see `problems.load_problems`."""

    default_source: str = ""
    strip_think: bool = True
    box_answer: bool = False
    task: LabelTask | None = None


def schema_of(columns: Collection[str], *, labelled: bool = False) -> Schema:
    """The schema of a file with these columns. Raises DataError that lists what was found and what is accepted.

    Args:
        columns: of the file.
        labelled: labels are configured, so the file must be of labelled texts.
    """
    have = set(columns)
    if labelled:
        if "label" in have and have & set(TEXT_COLUMNS):
            return "labels"
        raise DataError(
            f"columns {', '.join(sorted(have)) or '(none)'}: data.labels is set, and a file of labelled texts has label and "
            f"{' or '.join(TEXT_COLUMNS)}"
        )
    if is_coding(have):
        return "coding"
    if {"prompt", "reward_model"} <= have:
        return "verl"
    if {"prompt", "target"} <= have:
        return "openrlhf"
    if "messages" in have or ("prompt" in have and have & {"completion", "answer", "ground_truth", "solution"}):
        return "trl"
    if have & set(_QUESTION) and have & {*_ANSWER, *_DEMONSTRATION, "answer_index"}:
        return "mifo"
    raise DataError(f"columns {', '.join(sorted(have)) or '(none)'}: no known schema; accepted are {ACCEPTED}")


def problem_from_row(row: Row, schema: Schema, options: RowOptions | None = None) -> Problem:
    """The problem in a row, its demonstration unverified. Raises RowError with the reason when there is none."""
    options = options or RowOptions()
    if schema == "mifo":
        messages, answer, demonstration, grader = _mifo(row)
    elif schema == "labels":
        messages, answer, demonstration = _labelled(row, options.task)
        grader = "label"
    elif schema == "coding":
        messages, answer, demonstration = _coding(row)
        grader = "code"
    elif schema == "verl":
        messages, answer, demonstration = _verl(row)
        grader = _grader_of(row, messages, answer)
    else:
        messages, answer, demonstration = _turns_with_answer(row, schema)
        grader = _grader_of(row, messages, answer)
    if not any(m.content.strip() for m in messages if m.role != "system"):
        raise RowError("empty prompt")
    if messages[-1].role != "user":
        raise RowError("last turn is not the user's")
    if not answer:
        raise RowError("no answer")
    if demonstration and options.strip_think:
        demonstration = demonstration.removeprefix(THINK)
    boxes = options.box_answer and grader not in ("code", "label")
    if demonstration and demonstration.strip() and boxes and last_boxed(demonstration) is None:
        demonstration = f"{demonstration.rstrip()}\n\\boxed{{{answer}}}"
    return Problem(
        id=_id(row, messages, answer),
        messages=messages,
        answer=answer,
        demonstration=demonstration if demonstration and demonstration.strip() else None,
        source=_text(row.get("data_source")) or _text(row.get("source")) or options.default_source,
        grader=grader,
    )


def _mifo(row: Row) -> tuple[tuple[Message, ...], str | None, str | None, GraderName]:
    question = _first(row, _QUESTION)
    if question is None:
        raise RowError("empty prompt")
    demonstration = _first(row, _DEMONSTRATION)
    if demonstration is None and any(isinstance(row.get(name), Mapping) for name in _DEMONSTRATION):
        raise RowError("demonstration is no text")
    choices = _choices(row)
    if choices is not None:
        lines = [f"{letter}. {text}" for letter, text in zip(_LETTERS, choices, strict=False)]
        text = "\n".join([question, *lines, "Answer with the letter in \\boxed{}."])
        return (Message("user", text),), _choice_answer(row, choices), demonstration, "choice"
    answer = _first(row, _ANSWER)
    marker = _GSM8K.search(answer or "")
    if answer and marker:  # GSM8K: the answer column is the whole solution
        demonstration, answer = demonstration or answer, _plain_number(marker[1])
    if demonstration:
        demonstration = _box_gsm8k(demonstration)
        answer = answer or last_boxed(demonstration)
    messages = (Message("user", question),)
    return messages, answer, demonstration, _grader_of(row, messages, answer)


def _labelled(row: Row, task: LabelTask | None) -> tuple[tuple[Message, ...], str, str]:
    """The label is the answer and, since nothing else would be right, the demonstration."""
    assert task is not None
    found = text_and_label(row, task)
    if isinstance(found, str):
        raise RowError("no text" if not _first(row, TEXT_COLUMNS) else "a label that is none of data.labels")
    text, number = found
    return (Message("user", task.question(text)),), task.labels[number], task.labels[number]


def _coding(row: Row) -> tuple[tuple[Message, ...], str, str | None]:
    try:
        return coding_problem(row)
    except (KeyError, TypeError) as error:
        raise RowError(f"a coding problem without {error.args[0]}") from error


def _box_gsm8k(solution: str) -> str:
    r"""GSM8K's calculator marks removed and its `#### 18` written as the `\boxed{18}` that a rollout must give."""
    marker = _GSM8K.search(solution)
    if marker is None:
        return solution
    body = _CALCULATOR.sub("", solution[: marker.start()])
    return f"{body}\n\\boxed{{{_plain_number(marker[1])}}}"


def _plain_number(text: str) -> str:
    return text.replace(",", "") if _THOUSANDS.fullmatch(text) else text


def _verl(row: Row) -> tuple[tuple[Message, ...], str | None, str | None]:
    reward_model = row.get("reward_model")
    truth = reward_model.get("ground_truth") if isinstance(reward_model, Mapping) else None
    return _turns(row.get("prompt")), _text(truth), _response(row.get("target"))


def _turns_with_answer(row: Row, schema: Schema) -> tuple[tuple[Message, ...], str | None, str | None]:
    """trl and openrlhf: turns or text, a response or none, and the answer from a column or from the response's box."""
    if row.get("prompt") is not None:
        messages = _turns(row["prompt"])
        demonstration = _response(row.get("target" if schema == "openrlhf" else "completion"))
    else:
        messages, demonstration = _turns(row.get("messages")), None
        if messages and messages[-1].role == "assistant":
            messages, demonstration = messages[:-1], messages[-1].content
    if not messages:
        raise RowError("empty prompt")
    answer = _first(row, ("answer", "ground_truth", "solution"))
    if answer is not None and "\\boxed" in answer:
        answer = last_boxed(answer)
    if answer is None and demonstration:
        answer = last_boxed(demonstration)
    return messages, answer, demonstration


def _turns(value: Any) -> tuple[Message, ...]:
    if value is None or value == "" or value == []:
        raise RowError("empty prompt")
    if isinstance(value, str):
        return (Message("user", value),)
    if not isinstance(value, list):
        raise RowError("prompt is neither text nor a list of turns")
    turns = []
    for turn in value:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str):
            raise RowError("a turn lacks role or text content")
        if turn.get("role") not in ("system", "user", "assistant"):
            raise RowError("a turn's role is not system, user or assistant")
        turns.append(Message(turn["role"], turn["content"]))
    return tuple(turns)


def _response(value: Any) -> str | None:
    """The text of a response: a string, or turns of which the last is the assistant's; None if there is none."""
    if value is None or value == "" or value == []:
        return None
    if isinstance(value, str):
        return value
    last = _turns(value)[-1]
    if last.role != "assistant":
        raise RowError("the response's last turn is not the assistant's")
    return last.content


def _choices(row: Row) -> list[str] | None:
    value = next((row[name] for name in _OPTIONS if row.get(name) not in (None, [])), None)
    if isinstance(value, Mapping):  # ARC: {"text": [...], "label": [...]}
        value = value.get("text")
    if value is None:
        return None
    if not isinstance(value, list) or not 2 <= len(value) <= len(_LETTERS) or not all(_text(v) for v in value):
        raise RowError("options are not a list of 2 to 26 texts")
    return [cast(str, _text(v)) for v in value]


def _choice_answer(row: Row, choices: list[str]) -> str | None:
    """The letter of the option that all answer columns agree on; RowError if they do not or leave two open."""
    open_positions, named = set(range(len(choices))), False
    for name in (*_ANSWER, "answer_index"):
        value = row.get(name)
        if value is None or value == "":
            continue
        positions = _choice_positions(row, value, choices)
        if not positions:
            raise RowError(f"{name} names no option")
        open_positions, named = open_positions & positions, True
    if not named:
        return None
    if len(open_positions) != 1:
        raise RowError("answer names two options" if open_positions else "answer columns disagree")
    return _LETTERS[open_positions.pop()]


def _choice_positions(row: Row, value: Any, choices: list[str]) -> set[int]:
    """Where the options are that `value` may mean, as a label, an index, a capital letter or the option's text."""
    options = row.get("choices")
    labels = list(options.get("label") or ()) if isinstance(options, Mapping) else []
    if isinstance(value, int) and not isinstance(value, bool):
        positions = {value}
    elif not isinstance(value, str):
        positions = set()
    elif value in labels:
        positions = {labels.index(value)}
    else:
        positions = {i for i, text in enumerate(choices) if text == value}
        letter = value.strip()
        if len(letter) == 1 and letter in _LETTERS:
            positions.add(_LETTERS.index(letter))
    return {i for i in positions if 0 <= i < len(choices)}


def _grader_of(row: Row, messages: tuple[Message, ...], answer: str | None) -> GraderName:
    """The row's own `grader`; else "choice" for a letter answer to a prompt with lettered options; else "math"."""
    named = row.get("grader")
    if named is not None:
        if named not in get_args(GraderName):
            raise RowError("unknown grader")
        return cast(GraderName, named)
    text = messages[-1].content if messages else ""
    if answer and re.fullmatch("[A-J]", answer):
        lettered = {m[1] for m in re.finditer(r"(?m)^\s*\(?([A-J])[.):]\s", text)}
        if {"A", "B", answer} <= lettered:
            return "choice"
    return "math"


def _first(row: Row, names: Collection[str]) -> str | None:
    return next((text for name in names if (text := _text(row.get(name)))), None)


def _text(value: Any) -> str | None:
    """A scalar as text; None for nothing, NaN, infinity, blank text and a list of other than one element."""
    if isinstance(value, list):
        value = value[0] if len(value) == 1 else None
    if (
        value is None
        or isinstance(value, (bool, Mapping, list))
        or (isinstance(value, float) and not math.isfinite(value))
    ):
        return None
    text = value if isinstance(value, str) else str(value)
    return text if text.strip() else None


def _id(row: Row, messages: tuple[Message, ...], answer: str) -> str:
    """The row's `id`; without one, a hash of its content, so that a repeated row is a repeated id.

    verl's `extra_info.index` is not an id: it starts again in every split and data source.
    """
    given = _text(row.get("id"))
    if given is not None:
        return given
    content = "\x1f".join([*(f"{m.role}\x1e{m.content}" for m in messages), answer])
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]
