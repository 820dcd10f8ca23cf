"""Classification as text: labels, and how a text becomes a question whose answer is one of them.

The task of S4 is sentence acceptability in CoLA's format; any labels and any instruction do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mifo.errors import ConfigError

TEXT_COLUMNS = ("sentence", "text")
COLA_COLUMNS = ("source", "label", "star", "sentence")  # of its TSV files, which have no header
PLACE = "{text}"
MOST_DIGITS = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class LabelTask:
    """The labels, in the order of their numbers in a file, and how a text becomes a question ({text} stands for it).

    Raises:
        ConfigError: fewer than two labels, two that differ in case alone, or no place for the text.
    """

    labels: tuple[str, ...]
    instruction: str

    def __post_init__(self) -> None:
        if len(self.labels) < 2 or len({label.casefold() for label in self.labels}) < len(self.labels):
            raise ConfigError(f"labels {' '.join(self.labels)}: give two or more different labels.")
        if PLACE not in self.instruction:
            raise ConfigError(f"instruction = '{self.instruction}': it has no place for the text. Write {PLACE} there.")

    def question(self, text: str) -> str:
        """The user's turn for a text."""
        return self.instruction.replace(PLACE, text)


COLA = LabelTask(
    labels=("unacceptable", "acceptable"),
    instruction="Is the following English sentence grammatically acceptable? Answer with one word, acceptable or "
    "unacceptable.\n\nSentence: {text}",
)


def make_task(labels: tuple[str, ...], instruction: str | None) -> LabelTask:
    """The task of a configuration; without an instruction CoLA's labels have its own, others a general one.

    Raises:
        ConfigError: as `LabelTask`.
    """
    if instruction is None:
        listed = f"{', '.join(labels[:-1])} or {labels[-1]}" if labels else ""
        general = f"Which label fits the text: {listed}? Answer with the label alone.\n\nText: {PLACE}"
        instruction = COLA.instruction if labels == COLA.labels else general
    return LabelTask(labels=labels, instruction=instruction)


def tsv_rows(lines: Iterable[str]) -> Iterator[dict[str, str] | None]:
    """Rows of a file in CoLA's own format; None for a line of other than four columns."""
    for line in lines:  # nothing is quoted in them
        row = line.split("\t")
        yield dict(zip(COLA_COLUMNS, row, strict=True)) if len(row) == len(COLA_COLUMNS) else None


def text_and_label(row: Mapping[str, Any], task: LabelTask) -> tuple[str, int] | str:
    """The text of a row and the number of its label; or what is wrong with it.

    Args:
        row: a text in `sentence` or `text`, and `label`: the label itself, or, where no label is a number, its place in their
            order.
        task: its labels.
    """
    text = next((row[name] for name in TEXT_COLUMNS if isinstance(row.get(name), str)), "")
    if not text.strip():
        return f"it has no text in {' or '.join(TEXT_COLUMNS)}"
    label = row.get("label")
    if not isinstance(label, bool) and str(label) in task.labels:
        return text, task.labels.index(str(label))
    if any(name.isdecimal() for name in task.labels):  # a number would be a place as well as a label
        return f"label = {label!r} is none of {', '.join(task.labels)}"
    number = int(label) if isinstance(label, str) and label.isdecimal() and len(label) < MOST_DIGITS else label
    if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(task.labels):
        return text, number
    return f"label = {label!r} is neither one of {', '.join(task.labels)} nor a number below {len(task.labels)}"
