"""Two figures of a comparison: accuracy against FLOPs, and what each SFT phase cost, over time.

matplotlib is in the extra `report`; without it nothing else is missing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from mifo.lab.arena_compare import Comparison, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers tell apart, then the same in other line styles.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LINES = ("-", "--", ":")
GRID_POINTS = 100
PANELS_IN_A_ROW = 4


def have_matplotlib() -> bool:
    """Whether figures can be made."""
    return find_spec("matplotlib") is not None


def write_plots(comparison: Comparison, folder: Path) -> list[Path]:
    """accuracy.png, and forgetting.png where some SFT phase was measured; their paths. Needs matplotlib."""
    figures: dict[str, Figure | None] = {
        "accuracy.png": accuracy_figure(comparison),
        "forgetting.png": forgetting_figure(comparison),
    }
    written = []
    for name, figure in figures.items():
        if figure is not None:
            figure.savefig(folder / name, dpi=150)
            written.append(folder / name)
    return written


def accuracy_figure(comparison: Comparison) -> Figure:
    """Mean over seeds of held-out accuracy against training FLOPs, a line a method; faint lines are single seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 5.0), layout="constrained")
    axes = figure.add_subplot()
    for index, row in enumerate(comparison.rows):
        if not row.runs:
            continue
        colour, line = _look(index)
        curves = [np.array(run.curve, dtype=np.float64) for run in row.counted or row.runs]
        for curve in curves:
            axes.plot(curve[:, 0], 100 * curve[:, 1], color=colour, linewidth=0.6, alpha=0.25)
        flops, accuracy = mean_curve(curves)
        rank = "–" if row.rank is None else str(row.rank)
        axes.plot(flops, 100 * accuracy, color=colour, linestyle=line, linewidth=1.8, label=f"{rank}  {row.entry}")
    if comparison.budget.planned and comparison.budget.kind == "flops":
        axes.axvline(comparison.budget.amount, color="0.6", linewidth=0.8, linestyle="--")
    _finish(axes, "training FLOPs (2ND generated, 6ND trained)", "held-out accuracy, %")
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9, title="rank, method", alignment="left")
    axes.set_title("Accuracy against training FLOPs", loc="left", fontsize=11)
    return figure


def mean_curve(curves: Sequence[NDArray[np.float64]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The mean of curves of (x, y) rows over the range that all of them cover, by linear interpolation."""
    start, end = max(curve[0, 0] for curve in curves), min(curve[-1, 0] for curve in curves)
    own = sorted({x for curve in curves for x in curve[:, 0].tolist() if start <= x <= end})
    grid = np.array(own) if len(own) <= GRID_POINTS else np.linspace(start, end, GRID_POINTS)
    return grid, np.mean([np.interp(grid, curve[:, 0], curve[:, 1]) for curve in curves], axis=0)


def forgetting_figure(comparison: Comparison) -> Figure | None:
    """A panel a method: accuracy lost in each SFT phase against the FLOPs before it; a point below zero is a gain."""
    from matplotlib.figure import Figure

    rows = [row for row in comparison.rows if any(run.phases for run in row.runs)]
    if not rows:
        return None
    lines = math.ceil(len(rows) / PANELS_IN_A_ROW)
    columns = math.ceil(len(rows) / lines)
    figure = Figure(figsize=(2.6 * columns + 0.8, 2.3 * lines + 0.7), layout="constrained")
    panels: Any = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for panel, row in zip(panels.flat, rows, strict=False):
        _forgetting_panel(panel, row, comparison.rows.index(row))
    for index in range(len(rows), lines * columns):
        panels.flat[index].set_visible(False)
        panels.flat[index - columns].tick_params(labelbottom=True)  # the panel above is the last of its column
    figure.supxlabel("training FLOPs before the phase", fontsize=9)
    figure.supylabel("accuracy lost in the phase, % points", fontsize=9)
    figure.suptitle(
        "Forgetting: each SFT phase (point), and the mean over runs (dashed)", fontsize=11, x=0.01, ha="left"
    )
    return figure


def _forgetting_panel(axes: Axes, row: Row, index: int) -> None:
    colour, _ = _look(index)
    points = [(phase.flops, 100 * phase.forgotten) for run in row.counted or row.runs for phase in run.phases]
    axes.axhline(0.0, color="0.6", linewidth=0.8)
    axes.scatter([x for x, _ in points], [y for _, y in points], s=10, color=colour, alpha=0.7, linewidths=0)
    mean = 100 * row.figures["forgotten_per_sft_phase"].value
    axes.axhline(mean, color=colour, linewidth=1.2, linestyle="--")
    axes.set_title(f"{row.entry}: mean {mean:+.1f}", fontsize=9, loc="left")
    _finish(axes, "", "")


def _look(index: int) -> tuple[str, str]:
    return COLOURS[index % len(COLOURS)], LINES[index // len(COLOURS) % len(LINES)]


def _finish(axes: Axes, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.set_xlim(left=0)
    axes.tick_params(labelsize=8)
    axes.xaxis.get_offset_text().set_fontsize(8)
    axes.grid(color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
