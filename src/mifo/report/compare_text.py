"""A comparison as words: numbers with their units, and what a reader has to know to read them."""

from __future__ import annotations

from collections.abc import Iterator

from mifo.lab.arena_compare import Comparison, Row
from mifo.lab.arena_statistics import Estimate, widening

FEW_SEEDS = 5


def percent(estimate: Estimate | None, *, signed: bool = False) -> str:
    """A share with its interval, in percent; a dash where there is none."""
    if estimate is None:
        return "–"
    sign = "+" if signed else ""
    return f"{100 * estimate.value:{sign}.1f} [{100 * estimate.low:{sign}.0f}, {100 * estimate.high:{sign}.0f}]"


def mean(row: Row, figure: str, form: str = ",.0f", scale: float = 1.0) -> str:
    """A figure's mean over seeds; a dash where it was not measured."""
    found = row.figures.get(figure)
    return "–" if found is None else format(scale * found.value, form)


def seeds_of(row: Row) -> str:
    """How many runs a row's figures are over, of how many."""
    shown, planned = len(row.counted or row.runs), len(row.runs) + len(row.failures)
    return str(shown) if shown == planned else f"{shown} of {planned}"


def remarks(comparison: Comparison) -> Iterator[str]:
    """Everything that limits what the table says, most important first."""
    yield from _left_out(comparison)
    yield from _about_intervals(comparison)
    yield from _about_rates(comparison)
    yield from comparison.notes


def _left_out(comparison: Comparison) -> Iterator[str]:
    budget = comparison.budget
    for failure in comparison.failures:
        yield f"failed: {failure.name} ({failure.stage}): {failure.reason}; see {failure.log}"
    for row in comparison.rows:
        if not row.runs:
            yield f"{row.entry} has no finished run."
    for run in comparison.outside:
        if not run.whole:
            yield f"{run.name} ended before the last of its stages began; not ranked. Raise the budget, or shorten the others."
            continue
        yield (
            f"outside the budget: {run.name} spent {run.spent(budget.kind):.3g} {budget.kind}, "
            f"{100 * budget.deviation(run):+.1f} % of {budget.amount:.3g} (tolerance {100 * budget.tolerance:g} %); not ranked"
        )
    if not budget.planned:
        yield f"No budget was set for these runs: they are held to the median of their FLOPs, {budget.amount:.3g}."


def _about_intervals(comparison: Comparison) -> Iterator[str]:
    counts = {estimate.seeds for row in comparison.rows if (estimate := row.accuracy) is not None}
    if not counts:
        return
    fewest = min(counts)
    yield (
        "Brackets are 95 % intervals: a bootstrap over seeds and problems; differences are paired by seed and problem, and not "
        "corrected for how many are looked at."
    )
    if fewest == 1:
        yield "Where there is one seed, an interval is over problems alone: it says nothing about another seed."
    elif fewest < FEW_SEEDS:
        yield (
            f"{fewest} seeds say little about the spread between seeds. What resampling shows of it is widened "
            f"{widening(fewest):.1f} times, so that the intervals hold what they promise; they are wide because little is known."
        )


def _about_rates(comparison: Comparison) -> Iterator[str]:
    if comparison.tuned is None:
        return
    if not comparison.tuned:
        yield "Learning rates were not tuned (--no-tune): a method may be punished by a rate that was chosen for another."
        return
    choices = [row.choice for row in comparison.rows if row.choice is not None]
    points = max((len(choice.trials) for choice in choices), default=0)
    yield (
        f"Learning rates: the best of {points} points a method on validation problems, one seed each; "
        f"{comparison.tuning_flops:.3g} FLOPs in all, not part of the budget."
    )
    yield "Rates chosen: " + "; ".join(f"{choice.entry} {choice.describe()}" for choice in choices) + "."
    edge = [choice.entry for choice in choices if choice.at_edge]
    if edge:
        yield f"The best rate is at the edge of the grid for {', '.join(edge)}: others beyond it may be better."
    for choice in choices:
        failed = sum(trial.accuracy is None for trial in choice.trials)
        if failed:
            yield f"{choice.entry}: {failed} of {len(choice.trials)} points of its grid failed."
