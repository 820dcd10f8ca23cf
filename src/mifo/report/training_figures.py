"""Figures of the probes that train. Each function fills an empty matplotlib figure from a result; nothing here measures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mifo.lab.bugs import BugRun, Bugs
from mifo.lab.forgetting import Forgetting
from mifo.lab.sparsify_online import KINDS, OnlineSparsification
from mifo.report.figures import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKS = 40  # points that a curve is drawn with at most: means over as many updates


def draw_bugs(figure: Figure, found: Bugs) -> None:
    """Reported loss and gradient norm along training (S2 Figure 2), and accuracy at the end (Table 2), a colour a reduction."""
    figure.set_size_inches(13.0, 4.5)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1.2, 1.2, 1.0))
    for place, row in enumerate(found.table):
        colour = COLOURS[place % len(COLOURS)]
        runs = [run for run in found.runs if run.variant == row.variant]
        _curve(left, [run.losses for run in runs], colour, row.variant)
        _curve(middle, [run.norms for run in runs], colour, row.variant)
        _bar(right, place, row.accuracy.value, row.accuracy.low, row.accuracy.high, colour)
        _dots(right, place, runs)
    left.set_ylabel("loss as reported (nats a token)")
    left.legend(fontsize=8)
    middle.set_ylabel("gradient norm before clipping")
    for axes in (left, middle):
        axes.set_xlabel("update")
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
    right.set_xticks(range(len(found.table)), [row.variant for row in found.table], rotation=30, ha="right", fontsize=8)
    right.set_ylabel("accuracy (%)")
    right.set_title("95 % intervals; dots: seeds", fontsize=10)
    right.grid(alpha=0.3, axis="y")
    figure.suptitle(
        f"{found.settings.ranks} ranks of {found.settings.micro_batches} micro-batches; mean over seeds, shaded: their range",
        fontsize=10,
    )


def draw_forgetting(figure: Figure, found: Forgetting) -> None:
    """What each objective after RL changed (S0 Table 2), with the accuracies before it, and from where they came."""
    figure.set_size_inches(11.0, 4.5)
    left, right = figure.subplots(1, 2)
    start = sum(run.before for run in found.rl) / max(1, len(found.rl))
    for place, row in enumerate(found.table):
        colour = COLOURS[place % len(COLOURS)]
        left.plot([1, 2], [100 * row.before, 100 * row.after], "o-", color=colour, label=row.objective)
        if row.change is not None:
            _bar(right, place, row.change.value, row.change.low, row.change.high, colour)
        own = [run for run in found.rows() if run["objective"] == row.objective]
        right.plot([place] * len(own), [100 * run["change"] for run in own], "o", color="black", markersize=3)
    if found.rl and found.table:
        left.plot([0, 1], [100 * start, 100 * found.table[0].before], "o-", color="black", label="RL before them")
    settings = found.settings
    left.set_xticks([0, 1, 2], ["start", f"{settings.rl_steps} steps of RL", f"{settings.steps} steps more"])
    left.set_ylabel("accuracy (%), mean over seeds")
    left.legend(fontsize=8)
    left.grid(alpha=0.3)
    right.axhline(0.0, color="black", linewidth=0.8)
    right.set_xticks(range(len(found.table)), [row.objective for row in found.table], rotation=20, ha="right")
    right.set_ylabel("change of accuracy (points)")
    right.set_title("95 % intervals, paired by seed and problem; dots: seeds", fontsize=10)
    right.grid(alpha=0.3, axis="y")


def draw_online(figure: Figure, found: OnlineSparsification) -> None:
    """Accuracy along SFT and along RL, a colour a rate (S0 Figure 2)."""
    figure.set_size_inches(11.0, 4.5)
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), KINDS, strict=True):
        rows = [row for row in found.table if row.kind == kind]
        for colour, row in zip(COLOURS, rows, strict=False):
            steps, points = [step for step, _ in row.curve], [point for _, point in row.curve]
            label = f"{100 * row.rate:g} % dropped" if row.rate else "whole gradient"
            axes.plot(steps, [100 * p.value for p in points], "o-", color=colour, label=label, markersize=4)
            low, high = [100 * p.low for p in points], [100 * p.high for p in points]
            axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.set_title(kind.upper())
        axes.set_xlabel("step")
        axes.set_ylabel("accuracy (%)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle("mean over seeds; shaded: 95 % intervals", fontsize=10)


def _curve(axes: Axes, rows: Sequence[Sequence[float]], colour: str, label: str) -> None:
    """Mean over the runs of stretches of updates, with the range of the runs shaded."""
    length = min(map(len, rows))
    stretch = max(1, -(-length // MARKS))
    places = range(0, length, stretch)
    means = [[sum(row[i : i + stretch]) / len(row[i : i + stretch]) for i in places] for row in rows]
    middle = [sum(column) / len(column) for column in zip(*means, strict=True)]
    axes.plot([1 + i for i in places], middle, color=colour, label=label, linewidth=1.4)
    low, high = [min(c) for c in zip(*means, strict=True)], [max(c) for c in zip(*means, strict=True)]
    axes.fill_between([1 + i for i in places], low, high, color=colour, alpha=0.15, linewidth=0)


def _bar(axes: Axes, place: int, value: float, low: float, high: float, colour: str) -> None:
    """A share in percent with its interval."""
    error = [[100 * (value - low)], [100 * (high - value)]]
    axes.bar(place, 100 * value, color=colour, alpha=0.6, yerr=error, capsize=4)


def _dots(axes: Axes, place: int, runs: Sequence[BugRun]) -> None:
    axes.plot([place] * len(runs), [100 * run.accuracy for run in runs], "o", color="black", markersize=3)
