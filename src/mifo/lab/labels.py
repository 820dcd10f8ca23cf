r"""Classification as text: sentences with labels, prompts, strict and robust scoring, and scores that a majority cannot
flatter.

The task of S4 is CoLA: is a sentence acceptable? "unacceptable" contains "acceptable", so a search for the text finds
both: the robust rule takes the last of the labels that stands as a word of its own, \b(un)?acceptable\b. The strict
rule wants the label and nothing else, as the reward does. About 70 % of CoLA is acceptable, so accuracy and reward are read
beside Matthews' correlation and balanced accuracy.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mifo.data.extract import after_thought
from mifo.data.labelled import LabelTask, text_and_label, tsv_rows
from mifo.errors import DataError
from mifo.types import Message, Problem

UNREAD = (".csv", ".parquet", ".xlsx")  # endings of tables that are not read here


@dataclass(frozen=True, slots=True)
class Example:
    """A text and the number of its label."""

    text: str
    label: int

    def problem(self, task: LabelTask, number: int) -> Problem:
        """As a problem whose answer is the label."""
        turn = Message("user", task.question(self.text))
        return Problem(id=f"example-{number}", messages=(turn,), answer=task.labels[self.label], grader="label")


def read_examples(path: str, task: LabelTask, limit: int | None = None) -> tuple[Example, ...]:
    """Examples of a file: JSON lines with `sentence` or `text` and `label` (a number or the label itself), or CoLA's TSV.

    Raises:
        DataError: the file cannot be read, or a row is not an example; names the row.
    """
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"--data = '{path}' cannot be read ({error}). Name a JSONL or TSV file of labelled texts."
        ) from error
    if file.suffix in UNREAD:
        raise DataError(
            f"--data = '{path}': {file.suffix} files are not read here. Write JSON lines with sentence (or text) and label, "
            "or CoLA's TSV of four columns."
        )
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    rows = enumerate(tsv_rows(lines), 1) if file.suffix == ".tsv" else _json_lines(lines)
    examples = []
    for number, row in rows:
        example = _example(row, task)
        if isinstance(example, str):
            raise DataError(f"--data = '{path}', row {number}: {example}. Mend or remove it.")
        examples.append(example)
        if limit is not None and len(examples) == limit:
            break
    if not examples:
        raise DataError(f"--data = '{path}' holds no examples. Name a JSONL or TSV file of labelled texts.")
    return tuple(examples)


def _json_lines(lines: Sequence[str]) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None


def described(examples: Sequence[Example], task: LabelTask) -> str:
    """How many texts of each label were read, as a sentence."""
    counts = Counter(example.label for example in examples)
    shares = ", ".join(f"{counts[number]} {label}" for number, label in enumerate(task.labels))
    one = " All have one label, so correlation and balanced accuracy say nothing." if len(counts) == 1 else ""
    return f"The first {len(examples)} texts of the file: {shares}.{one}"


def _example(row: Any, task: LabelTask) -> Example | str:
    """The example in a row, or what is wrong with it."""
    if not isinstance(row, dict):
        return "it is no labelled text"
    found = text_and_label(row, task)
    return found if isinstance(found, str) else Example(*found)


def strict_label(response: str, task: LabelTask) -> int | None:
    """The label that a response consists of, but for a thought before it; None where it says anything else. As `rewards.label`,
    the reward of RL on labels."""
    answer = after_thought(response).strip()
    return task.labels.index(answer) if answer in task.labels else None


def robust_label(response: str, task: LabelTask) -> int | None:
    """The label that stands last in a response as a word of its own, in any letter case; None where there is none."""
    longest_first = sorted(task.labels, key=len, reverse=True)
    found = re.findall(rf"(?<!\w)({'|'.join(map(re.escape, longest_first))})(?!\w)", response, re.IGNORECASE)
    if not found:
        return None
    same = (re.fullmatch(re.escape(label), found[-1], re.IGNORECASE) for label in task.labels)
    return next(number for number, match in enumerate(same) if match)


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelScores:
    """Scores of predictions; `undecided` is the share without a label, which counts as wrong everywhere."""

    accuracy: float
    reward: float
    mcc: float
    balanced_accuracy: float
    undecided: float
    majority: float


def label_scores(gold: Sequence[int], predicted: Sequence[int | None]) -> LabelScores:
    """Accuracy, mean reward (+1 right, −1 wrong), Matthews' correlation and balanced accuracy.

    The correlation is Gorodkin's for several classes (R_K, 2004), which is Matthews' for two; "undecided" is a class of its own
    there. Balanced accuracy is the mean of the classes' recalls. A correlation without spread counts as 0.

    Args:
        gold: at least one.
        predicted: None where the response had no label.
    """
    count = len(gold)
    right = sum(g == p for g, p in zip(gold, predicted, strict=True))
    per_class, guessed = Counter(gold), Counter(predicted)
    hits = Counter(g for g, p in zip(gold, predicted, strict=True) if g == p)
    covariance = right * count - sum(per_class[k] * guessed[k] for k in per_class)
    spread = math.sqrt(count**2 - sum(n * n for n in guessed.values())) * math.sqrt(
        count**2 - sum(n * n for n in per_class.values())
    )
    return LabelScores(
        accuracy=right / count,
        reward=(2 * right - count) / count,
        mcc=covariance / spread if spread else 0.0,
        balanced_accuracy=sum(hits[k] / n for k, n in per_class.items()) / len(per_class),
        undecided=guessed[None] / count,
        majority=max(per_class.values()) / count,
    )
