"""A finished trial (`lab.trials`) as one frozen record, read from its run folder."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mifo.config.decode import decode
from mifo.config.schema import Config
from mifo.errors import CheckpointError
from mifo.lab.arena_results import AFTER, BEFORE, EVALUATIONS, SUMMARY
from mifo.train.checkpoint import read_json
from mifo.train.folder import CONFIG

EXPORT, METRICS, LEDGER = "export", "metrics.jsonl", "ledger.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One measurement on held-out problems: "before", "after" or "step N"; scores are shares of correct responses."""

    label: str
    step: int
    flops: float
    by_problem: Mapping[str, float]

    @property
    def accuracy(self) -> float:
        """Mean over the problems."""
        return sum(self.by_problem.values()) / len(self.by_problem)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialResult:
    """A finished trial. The mappings are the content of its JSON files, `metrics` one for each turn of the loop."""

    name: str
    folder: Path
    config: Config
    evaluations: tuple[Evaluation, ...]
    summary: Mapping[str, Any]
    ledger: Mapping[str, Any]
    metrics: tuple[Mapping[str, Any], ...]

    @property
    def seed(self) -> int:
        """Of the run."""
        return self.config.train.seed

    @property
    def export(self) -> Path | None:
        """Its model; None where that was not kept."""
        folder = self.folder / EXPORT
        return folder if folder.is_dir() else None

    @property
    def before(self) -> Evaluation:
        """Before the first update."""
        return self.evaluation(BEFORE)

    @property
    def after(self) -> Evaluation:
        """After the last update."""
        return self.evaluation(AFTER)

    @property
    def along(self) -> tuple[Evaluation, ...]:
        """All whole measurements in their order: before, every so many steps, after."""
        return tuple(e for e in self.evaluations if e.label in (BEFORE, AFTER) or e.label.startswith("step "))

    @property
    def updates(self) -> tuple[Mapping[str, Any], ...]:
        """Every optimizer update in its order, with "loss", "grad_norm", "tokens" and others of `train.tally.UpdateReport`."""
        return tuple(update for turn in self.metrics for update in turn["updates"])

    @property
    def rewarded(self) -> float | None:
        """Mean accuracy of the rollouts it trained on; None where it had none."""
        shares = [turn["accuracy"] for turn in self.metrics if "accuracy" in turn]
        return sum(shares) / len(shares) if shares else None

    @property
    def mixed_groups(self) -> float | None:
        """Share of the groups whose rewards differ; None where it had none. 0 means that RL had nothing to learn from."""
        shares = [1.0 - turn["all_equal_groups"] for turn in self.metrics if "all_equal_groups" in turn]
        return sum(shares) / len(shares) if shares else None

    def evaluation(self, label: str) -> Evaluation:
        """The measurement of a label.

        Raises:
            CheckpointError: there is none, such as in a run without held-out problems.
        """
        for evaluation in self.evaluations:
            if evaluation.label == label:
                return evaluation
        raise CheckpointError(
            f"{self.folder} has no measurement '{label}' in {EVALUATIONS}. Train it with held-out problems."
        )


def read_trial(folder: Path) -> TrialResult:
    """A finished run folder.

    Raises:
        CheckpointError: the run is not finished, or a file is damaged.
    """
    if not (folder / SUMMARY).is_file():
        raise CheckpointError(f"{folder} holds no finished run: there is no {SUMMARY}. Finish it with --resume.")
    try:
        evaluations = tuple(
            Evaluation(label=record["label"], step=record["step"], flops=record["flops"], by_problem=record["problems"])
            for record in _lines(folder / EVALUATIONS)
        )
    except KeyError as error:
        raise CheckpointError(f"{folder / EVALUATIONS} lacks {error}. Train the run again.") from error
    return TrialResult(
        name=folder.name,
        folder=folder,
        config=decode(Config, read_json(folder / CONFIG)),
        evaluations=evaluations,
        summary=read_json(folder / SUMMARY),
        ledger=read_json(folder / LEDGER),
        metrics=tuple(_lines(folder / METRICS)),
    )


def scores(results: Iterable[TrialResult], label: str = AFTER) -> dict[int, Mapping[str, float]]:
    """Scores on single problems by seed, as `arena_statistics` takes them; the results are those of one variant."""
    return {result.seed: result.evaluation(label).by_problem for result in results}


def _lines(path: Path) -> list[dict[str, Any]]:
    """Records of a JSONL file; none where it is not there."""
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged ({error}). Train the run again.") from error
