"""Problems from data files: which rows can be trained on, and an account of those that cannot.

A file is read in one of the schemas of `rows`, from one of the formats of `readers`. A row is dropped, with its reason
counted, when it holds no usable problem. A problem whose demonstration is over-long or fails verification is kept
without it, which is counted too. Nothing is dropped in silence, and a file with nothing usable is an error.

The verifier is the caller's, since rewards are a layer below. It gets all demonstrations of a file at once. Without one, no
demonstration can be trusted and all are put aside.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from mifo.data.labelled import LabelTask
from mifo.data.readers import RowOrReason, is_hub_id, read_rows
from mifo.data.rows import RowError, RowOptions, Schema, problem_from_row, schema_of
from mifo.errors import ConfigError, DataError
from mifo.types import GraderName, Problem, Verdict

__all__ = ["Limits", "LoadReport", "Verify", "load_problems", "problem_from_row", "summary"]

Verify = Callable[[Sequence[tuple[GraderName, str, str]]], Sequence[Verdict]]
"""Verdicts on (grader, response, answer), in their order."""
_DEMONSTRATION = "demonstration "  # reasons that cost the demonstration and not the row start with it
_GENERIC_NAMES = frozenset({"train", "test", "validation", "valid", "val", "dev", "data"})
_SCHEMA_ROWS = 64  # rows whose columns decide the schema: JSON lines may leave out empty columns


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The longest prompt and demonstration, in characters and, with `token_length` (text -> tokens), in tokens.

    A prompt is measured as the text of all its turns, before any template.
    """

    prompt_chars: int = 20_000
    demonstration_chars: int = 100_000
    prompt_tokens: int | None = None
    demonstration_tokens: int | None = None
    token_length: Callable[[str], int] | None = None

    def __post_init__(self) -> None:
        for name in ("prompt_chars", "demonstration_chars", "prompt_tokens", "demonstration_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} = {value}: no text is that short; give 1 or more")
        if self.token_length is None and (self.prompt_tokens or self.demonstration_tokens):
            raise ConfigError("prompt_tokens and demonstration_tokens count with token_length, which is None; give it")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What was loaded and what was not.

    `counts` has the number of rows per reason; reasons that start with "demonstration" cost only the demonstration.
    `fingerprint` is the SHA-256 of the loaded problems (not of the file: the same problems in another format have it
    too). `rows` are the rows read, usable or not.
    """

    path: str
    problems: tuple[Problem, ...]
    schema: Schema
    counts: Mapping[str, int]
    rows: int
    columns: tuple[str, ...]
    fingerprint: str


def load_problems(
    path: str,
    *,
    limits: Limits | None = None,
    verify: Verify | None = None,
    split: str | None = None,
    strip_think: bool = True,
    box_answer: bool = False,
    task: LabelTask | None = None,
) -> LoadReport:
    r"""Read a file, a folder or a hub data set.

    `verify` judges the demonstrations. `split` chooses within folders and hub data sets.
    `strip_think` drops a leading `<think>\n` of a demonstration, for templates that end the prompt in it.
    `box_answer` ends a demonstration that has no box with the reference answer in one; only for solutions that are
    known to be right, since the verifier then sees the reference itself.
    `task` has rows read as labelled texts.

    Raises DataError when the path cannot be read, its columns fit no schema, or no row is usable.
    """
    limits = limits or Limits()
    options = RowOptions(default_source=_source_name(path), strip_think=strip_think, box_answer=box_answer, task=task)
    rows = list(read_rows(path, split))
    columns = _columns(rows)
    if not rows:
        raise DataError(f"data = {path!r}: holds no rows; check the file and the split")
    if not columns:
        raise DataError(f"data = {path!r}: no row could be read ({_listed(Counter(map(str, rows)))}); check the file")
    try:
        schema = schema_of(columns, labelled=task is not None)
    except DataError as error:
        raise DataError(f"data = {path!r}: {error}") from error
    counts: Counter[str] = Counter()
    problems = _verified(_usable(rows, schema, options, limits, counts), verify, counts)
    if not problems:
        raise DataError(
            f"data = {path!r}: none of {len(rows)} rows is usable as {schema} ({_listed(counts)}); columns found: "
            f"{', '.join(columns)}"
        )
    return LoadReport(
        path=path,
        problems=problems,
        schema=schema,
        counts=MappingProxyType(dict(sorted(counts.items()))),
        rows=len(rows),
        columns=columns,
        fingerprint=fingerprint(problems),
    )


def summary(report: LoadReport) -> str:
    """One paragraph for the log: what came in, what was dropped and why."""
    with_demonstration = sum(p.demonstration is not None for p in report.problems)
    dropped = {k: n for k, n in report.counts.items() if not k.startswith(_DEMONSTRATION)}
    lost = {k: n for k, n in report.counts.items() if k.startswith(_DEMONSTRATION)}
    graders: Counter[str] = Counter(p.grader for p in report.problems)
    parts = [
        f"{report.path}: {len(report.problems)} problems from {report.rows} rows (schema {report.schema}, graded by "
        f"{_listed(graders)}), {with_demonstration} with a demonstration."
    ]
    if dropped:
        parts.append(f"Dropped {sum(dropped.values())} rows: {_listed(dropped)}.")
    if lost:
        parts.append(f"Put aside {sum(lost.values())} demonstrations: {_listed(lost)}.")
    parts.append(f"Fingerprint {report.fingerprint[:12]}.")
    return " ".join(parts)


def _usable(
    rows: list[RowOrReason], schema: Schema, options: RowOptions, limits: Limits, counts: Counter[str]
) -> list[Problem]:
    """The usable problems in the order of the rows, without over-long demonstrations; every reason is added to `counts`."""
    problems: dict[str, Problem] = {}
    for row in rows:
        if isinstance(row, str):
            counts[row] += 1
            continue
        try:
            problem = problem_from_row(row, schema, options)
            _check_prompt(problem, limits)
        except RowError as error:
            counts[str(error)] += 1
            continue
        if problem.id in problems:
            counts["duplicate id"] += 1
            continue
        text = problem.demonstration or ""
        if _over(text, limits.demonstration_chars, limits.demonstration_tokens, limits.token_length):
            counts[_DEMONSTRATION + "too long"] += 1
            problem = replace(problem, demonstration=None)
        problems[problem.id] = problem
    return list(problems.values())


def _verified(problems: list[Problem], verify: Verify | None, counts: Counter[str]) -> tuple[Problem, ...]:
    """The problems without the demonstrations that fail verification; every reason is added to `counts`."""
    to_verify = [(p.grader, p.demonstration, p.answer) for p in problems if p.demonstration is not None]
    if verify is None:
        faults: list[str | None] = ["unverified (no verifier)"] * len(to_verify)
    else:
        faults = [None if v is Verdict.CORRECT else f"verified as {v.value}" for v in verify(to_verify)]
    left = iter(faults)
    kept = []
    for problem in problems:
        fault = None if problem.demonstration is None else next(left)
        if fault is not None:
            counts[_DEMONSTRATION + fault] += 1
        kept.append(problem if fault is None else replace(problem, demonstration=None))
    return tuple(kept)


def _check_prompt(problem: Problem, limits: Limits) -> None:
    text = "\n".join(m.content for m in problem.messages)
    for part in (problem.id, text, problem.answer, problem.demonstration or "", problem.source):
        if not _encodable(part):  # JSON can smuggle in half of a surrogate pair
            raise RowError("bad UTF-8")
    if _over(text, limits.prompt_chars, limits.prompt_tokens, limits.token_length):
        raise RowError("prompt too long")


def _over(text: str, chars: int, tokens: int | None, length: Callable[[str], int] | None) -> bool:
    if len(text) > chars:
        return True
    return tokens is not None and length is not None and length(text) > tokens


def _encodable(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _columns(rows: list[RowOrReason]) -> tuple[str, ...]:
    """Columns of the first rows that could be read, in order of appearance."""
    readable = [row for row in rows if not isinstance(row, str)][:_SCHEMA_ROWS]
    return tuple(dict.fromkeys(str(name) for row in readable for name in row))


def _source_name(path: str) -> str:
    """What to report problems under when the data does not say: the file's name, or its folder's if that says more."""
    if is_hub_id(path):
        return path
    name = Path(path).name.split(".")[0]
    folder = Path(path).resolve().parent.name
    return folder if name.lower() in _GENERIC_NAMES and folder else name


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{reason} {number}" for reason, number in sorted(counts.items(), key=lambda kv: (-kv[1], kv[0])))


def fingerprint(problems: Sequence[Problem]) -> str:
    """SHA-256 of everything that problems hold, in their order."""
    content = hashlib.sha256()
    for p in problems:
        fields = [p.id, [list(m) for m in p.messages], p.answer, p.demonstration, p.source, p.grader]
        content.update(json.dumps(fields, ensure_ascii=True).encode("ascii") + b"\n")
    return content.hexdigest()
