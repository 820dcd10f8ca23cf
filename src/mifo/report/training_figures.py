"""Figures of the probes that train. Each function fills an empty matplotlib figure from a result; nothing here measures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mifo.lab.bugs import BugRun, Bugs
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
