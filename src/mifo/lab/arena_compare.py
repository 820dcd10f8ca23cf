"""From finished runs to a comparison: who is left out and why, means with intervals, differences, ranks."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mifo.lab.arena_file import BudgetKind
from mifo.lab.arena_results import Failure, RunResult
from mifo.lab.arena_statistics import (
    Estimate,
    Runs,
    interval,
    paired_difference,
    score_table,
    share_interval,
    shared_problems,
)
from mifo.lab.arena_tuning import Choice

Getter = Callable[[RunResult], "float | None"]
FIGURES: dict[str, Getter] = {
    "response_length": lambda run: run.response_length,
    "truncated": lambda run: run.truncated,
    "forgotten_per_sft_phase": lambda run: run.forgotten,
    "movement": lambda run: run.movement,
    "relative_movement": lambda run: run.relative_movement,
    "unique_problems": lambda run: run.unique_problems,
    "demonstrations": lambda run: run.demonstrations,
    "unique_demonstrations": lambda run: run.unique_demonstrations,
    "flops": lambda run: run.flops,
    "tokens": lambda run: run.tokens,
    "steps": lambda run: run.steps,
    "minutes": lambda run: run.seconds / 60,
}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What the runs should have spent. `planned` is false where it is the median of existing runs."""

    kind: BudgetKind
    amount: float
    tolerance: float
    planned: bool = True

    def deviation(self, run: RunResult) -> float:
        """Share by which a run spent more (or, negative, less)."""
        return run.spent(self.kind) / self.amount - 1.0

    def keeps(self, run: RunResult) -> bool:
        """Whether a run is within the tolerance, and did all that it is named after."""
        return run.whole and abs(self.deviation(run)) <= self.tolerance


@dataclass(frozen=True, kw_only=True)
class Row:
    """One method. Figures are over the runs that count: those within the budget, or all where none is."""

    entry: str
    rank: int | None
    runs: tuple[RunResult, ...]
    counted: tuple[RunResult, ...]
    failures: tuple[Failure, ...]
    accuracy: Estimate | None
    ood: Estimate | None
    difference: Estimate | None
    ood_difference: Estimate | None
    figures: Mapping[str, Estimate]
    choice: Choice | None

    @property
    def within_budget(self) -> bool:
        """The row's figures may be ranked."""
        return self.rank is not None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that the table, the files and the figures show; rows are in the order of rank."""

    name: str
    description: str
    reference: str
    budget: Budget
    rows: tuple[Row, ...]
    outside: tuple[RunResult, ...]
    failures: tuple[Failure, ...]
    tuned: bool | None
    tuning_flops: float
    seeds: tuple[int, ...]
    notes: tuple[str, ...] = field(default=())


def median_budget(runs: Sequence[RunResult], tolerance: float) -> Budget:
    """What existing runs are held to when no budget is known: the median of their FLOPs."""
    return Budget(kind="flops", amount=statistics.median(run.flops for run in runs), tolerance=tolerance, planned=False)


def compare(
    runs: Sequence[RunResult],
    *,
    entries: Sequence[str],
    reference: str,
    budget: Budget,
    name: str,
    description: str = "",
    failures: Sequence[Failure] = (),
    choices: Sequence[Choice] = (),
    tuned: bool | None,
    notes: Sequence[str] = (),
) -> Comparison:
    """Compare finished runs.

    Args:
        runs: of all methods and seeds; a (method, seed) at most once.
        entries: names of the methods, those without any finished run included.
        reference: the method that differences are to.
        budget: what each run should have spent.
        name: of the comparison.
        description: one line.
        failures: runs that did not finish.
        choices: learning rates, where they were chosen.
        tuned: whether rates were selected on validation problems; None: not known.
        notes: what a reader has to know beside.
    """
    by_entry = {entry: tuple(run for run in runs if run.entry == entry) for entry in entries}
    counted = {entry: tuple(run for run in own if budget.keeps(run)) for entry, own in by_entry.items()}
    rows = _rows(by_entry, counted, reference, failures, choices)
    last = len(rows) + 1
    return Comparison(
        name=name,
        description=description,
        reference=reference,
        budget=budget,
        rows=tuple(sorted(rows, key=lambda row: row.rank or last)),
        outside=tuple(run for run in runs if not budget.keeps(run)),
        failures=tuple(failures),
        tuned=tuned,
        tuning_flops=sum(trial.flops for choice in choices for trial in choice.trials),
        seeds=tuple(sorted({run.seed for run in runs})),
        notes=(*notes, *check_starts(runs)),
    )


def _rows(
    by_entry: Mapping[str, tuple[RunResult, ...]],
    counted: Mapping[str, tuple[RunResult, ...]],
    reference: str,
    failures: Sequence[Failure],
    choices: Sequence[Choice],
) -> list[Row]:
    """A row for each method; where no run is within the budget, of those beyond it."""
    shown = {entry: counted[entry] or own for entry, own in by_entry.items()}
    ranks = _ranks(counted)
    chosen = {choice.entry: choice for choice in choices}
    return [
        Row(
            entry=entry,
            rank=ranks.get(entry),
            runs=own,
            counted=counted[entry],
            failures=tuple(f for f in failures if f.entry == entry),
            accuracy=_accuracy(_in_distribution(shown[entry])),
            ood=_accuracy(_out_of_distribution(shown[entry])),
            difference=_difference(shown, entry, reference, _in_distribution),
            ood_difference=_difference(shown, entry, reference, _out_of_distribution),
            figures=_figures(shown[entry]),
            choice=chosen.get(entry),
        )
        for entry, own in by_entry.items()
    ]


def _ranks(counted: Mapping[str, Sequence[RunResult]]) -> dict[str, int]:
    """1 for the highest mean accuracy of the runs within the budget; equal means share a rank."""
    means = {entry: statistics.fmean(run.accuracy for run in runs) for entry, runs in counted.items() if runs}
    return {entry: 1 + sum(other > mean for other in means.values()) for entry, mean in means.items()}


def _in_distribution(runs: Sequence[RunResult]) -> Runs:
    return {run.seed: run.by_problem for run in runs}


def _out_of_distribution(runs: Sequence[RunResult]) -> Runs:
    return {run.seed: run.ood for run in runs if run.ood}


def _accuracy(runs: Runs) -> Estimate | None:
    problems = shared_problems([runs])
    return share_interval(score_table(runs, sorted(runs), problems)) if problems else None


def _difference(
    shown: Mapping[str, Sequence[RunResult]], entry: str, reference: str, scores: Callable[[Sequence[RunResult]], Runs]
) -> Estimate | None:
    """None for the reference itself, and where it has no run."""
    if entry == reference or not shown.get(reference) or not shown[entry]:
        return None
    return paired_difference(scores(shown[entry]), scores(shown[reference]))


def _figures(runs: Sequence[RunResult]) -> dict[str, Estimate]:
    found = {}
    for name, getter in FIGURES.items():
        values = [value for run in runs if (value := getter(run)) is not None]
        if values:
            found[name] = interval(np.array(values, dtype=np.float64)[:, None])
    return found


def check_starts(runs: Sequence[RunResult]) -> list[str]:
    """A note for each seed whose runs did not begin with the same verdicts: another checkpoint, or other problems."""
    notes = []
    for seed in sorted({run.seed for run in runs}):
        own = [run for run in runs if run.seed == seed and run.by_problem_before]
        others = [run for run in own if dict(run.by_problem_before) != dict(own[0].by_problem_before)]
        if others:
            notes.append(
                f"before training, {others[0].name} answered differently from {own[0].name} (seed {seed}): they do not begin "
                "from the same model, or arithmetic differs between them"
            )
    return notes
