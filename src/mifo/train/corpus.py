"""The problems of a run, as token ids: read, verified, cut to the run's limits, and accounted for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mifo.config.schema import Config, DataConfig
from mifo.data import tasks
from mifo.data.chat import Chat
from mifo.data.labelled import make_task
from mifo.data.problems import LoadReport, Verify, fingerprint, load_problems, summary
from mifo.errors import DataError
from mifo.types import GraderName, Problem, TokenIds, Verdict

NONE = "none"
EMBEDDED_SPLITS: dict[str, tasks.Split | None] = {
    "embedded": None,
    "embedded:train": "train",
    "embedded:validation": "validation",
    "embedded:test": "test",
    "embedded:ood": "ood",
}
DEFAULT_EMBEDDED = 2000
Part = Literal["train", "evaluation"]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Prompt and demonstration of one problem as ids."""

    prompt_ids: TokenIds
    demonstration_ids: TokenIds | None


@dataclass(frozen=True, slots=True)
class Corpus:
    """What a run trains on and is measured on.

    `notes` are readable paragraphs for the log: the schema found, what was dropped and why.
    """

    train: tuple[Problem, ...]
    evaluation: tuple[Problem, ...]
    encoded: Mapping[str, Encoded]
    held_out: Mapping[str, Encoded]
    notes: tuple[str, ...]
    fingerprint: str

    @property
    def with_demonstration(self) -> int:
        """Training problems that have a demonstration."""
        return sum(entry.demonstration_ids is not None for entry in self.encoded.values())

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt, training or held out."""
        return max(len(entry.prompt_ids) for entry in (*self.encoded.values(), *self.held_out.values()))

    @property
    def longest_demonstrated(self) -> int:
        """Tokens of the longest training prompt together with its demonstration."""
        return max(len(e.prompt_ids) + len(e.demonstration_ids or ()) for e in self.encoded.values())


def read_corpus(config: Config, chat: Chat, verify: Verify, *, needs_demonstrations: bool) -> Corpus:
    """Read training and held-out problems.

    Args:
        config: the run's configuration.
        chat: makes ids of prompts and demonstrations.
        verify: grades demonstrations against their answers.
        needs_demonstrations: keep only training problems that have one.

    Raises:
        DataError: nothing usable is left; says why.
    """
    data = config.data
    checked = verify if data.verify_demonstrations else _trusting
    train, train_note, content = _read(data, "train", checked)
    evaluation: tuple[Problem, ...] = ()
    notes = [train_note]
    if data.evaluation != NONE:
        evaluation, note, held_out_content = _read(data, "evaluation", checked)
        content = f"{content}+{held_out_content}"
        notes.append(note)
    kept, encoded, dropped = _encode(train, chat, data, needs_demonstrations)
    if dropped:
        notes.append(f"data.train: {_listed(dropped)}.")
    if not kept:
        raise DataError(
            f"data.train = '{data.train}': none of {len(train)} problems is left ({_listed(dropped)}). Raise "
            "data.max_prompt_tokens or data.max_demonstration_tokens, or bring other data."
        )
    unseen, lost = _disjoint(kept, evaluation)
    if lost:
        notes.append(f"data.evaluation: left out {lost} problems that are also trained on.")
    measured, held_out, unusable = _encode([replace(p, demonstration=None) for p in unseen], chat, data, False)
    if unusable:
        notes.append(f"data.evaluation: {_listed(unusable)}.")
    if unseen and not measured:
        raise DataError(f"data.evaluation = '{data.evaluation}': none of its problems is left ({_listed(unusable)}).")
    return Corpus(tuple(kept), tuple(measured), encoded, held_out, tuple(notes), content)


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(counts.items()))


def read_evaluation(data: DataConfig, verify: Verify) -> tuple[tuple[Problem, ...], str]:
    """Held-out problems alone, with a readable note on what was read.

    Raises:
        DataError: the file cannot be read or holds nothing usable.
    """
    problems, note, _ = _read(data, "evaluation", verify)
    return problems, note


def _trusting(demonstrations: Sequence[tuple[GraderName, str, str]]) -> list[Verdict]:
    """Stands in for the verifier where the user vouches for the demonstrations."""
    return [Verdict.CORRECT] * len(demonstrations)


def _read(data: DataConfig, part: Part, verify: Verify) -> tuple[tuple[Problem, ...], str, str]:
    path = data.train if part == "train" else data.evaluation
    count = data.train_problems if part == "train" else data.evaluation_problems
    if path in EMBEDDED_SPLITS:
        return _embedded(data, part, count)
    try:
        report = _load(data, part, path, verify)
    except DataError as error:  # it speaks of data = PATH; the user wrote data.train or data.evaluation
        raise DataError(str(error).replace("data = ", f"data.{part} = ", 1)) from error
    problems = report.problems[:count]
    cut = "" if len(problems) == len(report.problems) else f" Using the first {count}."
    return problems, f"data.{part}: {summary(report)}{cut}", report.fingerprint


def _load(data: DataConfig, part: Part, path: str, verify: Verify) -> LoadReport:
    return load_problems(
        path,
        verify=verify,
        split=data.split if part == "train" else data.evaluation_split,
        strip_think=data.template == "luffy",
        box_answer=data.box_answers and part == "train",
        task=make_task(data.labels, data.instruction) if data.labels else None,
    )


def embedded_available(data: DataConfig, part: Part) -> int | None:
    """How many embedded problems a part can have with the table's families and levels; None where it is a file."""
    if (data.train if part == "train" else data.evaluation) not in EMBEDDED_SPLITS:
        return None
    split, families = _embedded_split(data, part)
    return tasks.available(split, families=families, max_level=data.levels)


def _embedded_split(data: DataConfig, part: Part) -> tuple[tasks.Split, tuple[str, ...] | None]:
    split = EMBEDDED_SPLITS[data.train if part == "train" else data.evaluation]
    split = split or ("train" if part == "train" else "test")
    return split, None if split == "ood" else data.families or None


def _embedded(data: DataConfig, part: Part, count: int | None) -> tuple[tuple[Problem, ...], str, str]:
    split, families = _embedded_split(data, part)
    wanted = count or DEFAULT_EMBEDDED
    try:
        problems = tuple(tasks.generate(split, wanted, families=families, max_level=data.levels))
    except DataError as error:  # it speaks of count; the user wrote data.train_problems or data.evaluation_problems
        name = "train_problems" if part == "train" else "evaluation_problems"
        raise DataError(str(error).replace("count = ", f"data.{name} = ", 1)) from error
    names = ", ".join(sorted({p.source.split("/")[-1] for p in problems}))
    note = f"data.{part}: {len(problems)} embedded problems, split {split} ({names})."
    return problems, note, fingerprint(problems)


def _encode(
    problems: Sequence[Problem], chat: Chat, data: DataConfig, needs_demonstrations: bool
) -> tuple[list[Problem], dict[str, Encoded], dict[str, int]]:
    kept: list[Problem] = []
    encoded: dict[str, Encoded] = {}
    dropped: dict[str, int] = {}

    def count(reason: str) -> None:
        dropped[reason] = dropped.get(reason, 0) + 1

    for problem in problems:
        try:
            prompt_ids = chat.prompt_ids(problem)
        except DataError:  # turns that the template has no place for, or a prompt without tokens
            count(f"dropped: template '{data.template}' cannot render them")
            continue
        if len(prompt_ids) > data.max_prompt_tokens:
            count(f"dropped with a prompt over {data.max_prompt_tokens} tokens")
            continue
        demonstration = None
        if problem.demonstration is not None:
            try:
                demonstration = chat.demonstration_ids(problem.demonstration)
            except DataError:
                count("without their demonstration, which holds an end token inside, a stop text, or nothing")
        if demonstration is not None and len(demonstration) > data.max_demonstration_tokens:
            count(f"without their demonstration of over {data.max_demonstration_tokens} tokens")
            demonstration = None
        if demonstration is None and needs_demonstrations:
            count("dropped without a demonstration")
            continue
        kept.append(problem if demonstration is not None else replace(problem, demonstration=None))
        encoded[problem.id] = Encoded(prompt_ids, demonstration)
    return kept, encoded, dropped


def _disjoint(train: Sequence[Problem], evaluation: Sequence[Problem]) -> tuple[tuple[Problem, ...], int]:
    """Held-out problems whose text is not trained on."""
    seen = {" ".join(m.content for m in p.messages if m.role == "user") for p in train}
    kept = tuple(p for p in evaluation if " ".join(m.content for m in p.messages if m.role == "user") not in seen)
    if evaluation and not kept:
        raise DataError("data.evaluation: every held-out problem is also trained on. Name another file or split.")
    return kept, len(evaluation) - len(kept)
