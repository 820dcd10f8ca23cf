"""What a finished run folder says, as one frozen record."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mifo.config.decode import decode
from mifo.config.schema import Config
from mifo.errors import CheckpointError
from mifo.lab.arena_file import BudgetKind
from mifo.lab.arena_plan import rates_of
from mifo.train.checkpoint import read_json

SUMMARY, MEASURED, EVALUATIONS, EVENTS = "summary.json", "measured.json", "evaluations.jsonl", "events.jsonl"
BEFORE, AFTER = "before", "after"


@dataclass(frozen=True, slots=True, kw_only=True)
class SftPhase:
    """Accuracy around one SFT phase, and the FLOPs spent before it."""

    flops: float
    before: float
    after: float

    @property
    def forgotten(self) -> float:
        """Accuracy lost; negative where the phase brought some."""
        return self.before - self.after


@dataclass(frozen=True, slots=True, kw_only=True)
class RunResult:
    """One finished run. Shares are in [0, 1], lengths in tokens; None stands for what was not measured."""

    name: str
    entry: str
    seed: int
    rates: tuple[float, float]
    config: Config
    accuracy: float
    by_problem: Mapping[str, float]
    by_problem_before: Mapping[str, float]
    ood: Mapping[str, float] | None
    response_length: float
    truncated: float
    phases: tuple[SftPhase, ...]
    curve: tuple[tuple[float, float], ...]
    movement: float | None
    relative_movement: float | None
    flops: float
    tokens: int
    steps: int
    seconds: float
    unique_problems: int
    demonstrations: int
    unique_demonstrations: int
    data: str
    whole: bool = True
    """Of a list of stages the last was begun."""

    def spent(self, kind: BudgetKind) -> float:
        """How much of a budget's currency the run used."""
        return {"flops": self.flops, "tokens": self.tokens, "steps": self.steps, "minutes": self.seconds / 60}[kind]

    @property
    def forgotten(self) -> float | None:
        """Mean accuracy lost in an SFT phase; None where the run had none that was measured."""
        return sum(p.forgotten for p in self.phases) / len(self.phases) if self.phases else None

    @property
    def ood_accuracy(self) -> float | None:
        """Mean over the problems of other kinds."""
        return sum(self.ood.values()) / len(self.ood) if self.ood else None


def read_run(folder: Path, entry: str | None = None) -> RunResult:
    """The figures of a finished run.

    Args:
        folder: a run folder.
        entry: the method's name in the comparison; None takes the configuration's.

    Raises:
        CheckpointError: the run is not finished, was not measured on held-out problems, or a file is damaged.
    """
    if not (folder / SUMMARY).is_file():
        raise CheckpointError(f"{folder} holds no finished run: there is no {SUMMARY}. Finish it with --resume.")
    summary, config = read_json(folder / SUMMARY), decode(Config, read_json(folder / "config.json"))
    evaluations = list(_lines(folder / EVALUATIONS))
    by_label = {record["label"]: record["problems"] for record in evaluations}
    if AFTER not in by_label:
        raise CheckpointError(
            f"{folder} has no verdicts on single problems in {EVALUATIONS}: it was trained without held-out problems, or by an "
            "earlier version. Train it again."
        )
    measured = read_json(folder / MEASURED) if (folder / MEASURED).is_file() else {}
    try:
        return _result(folder, entry, config, summary, by_label, evaluations, measured)
    except KeyError as error:
        raise CheckpointError(
            f"{folder / SUMMARY} lacks {error}: it was written by an earlier version. Train it again."
        ) from error


def _result(
    folder: Path,
    entry: str | None,
    config: Config,
    summary: Mapping[str, Any],
    by_label: Mapping[str, Mapping[str, float]],
    evaluations: list[dict[str, Any]],
    measured: Mapping[str, Any],
) -> RunResult:
    verdicts, movement = by_label[AFTER], measured.get("movement", {})
    return RunResult(
        name=folder.name,
        entry=entry or config.method_name,
        seed=config.train.seed,
        rates=rates_of(config),
        config=config,
        accuracy=sum(verdicts.values()) / len(verdicts),
        by_problem=verdicts,
        by_problem_before=by_label.get(BEFORE, {}),
        ood=measured.get("ood"),
        response_length=summary["response_length_after"],
        truncated=summary["truncated_after"],
        phases=tuple(_phases(summary["sft_phases"])),
        curve=tuple(
            (record["flops"], sum(record["problems"].values()) / len(record["problems"]))
            for record in evaluations
            if record["label"] in (BEFORE, AFTER) or record["label"].startswith("step ")
        ),
        movement=movement.get("l2"),
        relative_movement=movement.get("relative"),
        flops=summary["flops"],
        tokens=summary["tokens"],
        steps=summary["steps"],
        seconds=summary["seconds"],
        unique_problems=summary["unique_problems"],
        demonstrations=summary["demonstrations_used"],
        unique_demonstrations=summary["unique_demonstrations"],
        data=summary["data"],
        whole=not config.stages or summary["stages"][-1]["stage"] == config.stage_numbers[-1],
    )


def _phases(records: list[dict[str, Any]]) -> Iterator[SftPhase]:
    for record in records:
        if record["before"] is not None:
            yield SftPhase(flops=record["flops"], before=record["before"], after=record["after"])


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a JSONL file; none where it is not there."""
    if not path.is_file():
        return
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            yield json.loads(line)
        except ValueError as error:
            raise CheckpointError(f"{path}, line {number} is damaged ({error}). Train the run again.") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """A run that did not come to its end, with what its log says last."""

    name: str
    entry: str
    stage: str
    seed: int
    reason: str
    log: str
