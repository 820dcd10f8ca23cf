"""The claims of `mifo paper` as a figure: every interval beside the bound that it is held against."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mifo.lab.claims import Claim, Unit, Verdict
from mifo.lab.paper.finding import Judged

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours with markers of their own, so that nothing hangs on colour alone.
LOOKS: dict[Verdict, tuple[str, str]] = {
    "reproduces": ("#009E73", "o"),
    "does not": ("#D55E00", "X"),
    "cannot be told": ("#8a8a8a", "|"),
}
ROW_INCHES = 0.24
LABELS: dict[Unit, str] = {"points": "points of accuracy", "ratio": "ratio", "nats": "nats"}


def draw_claims(figure: Figure, judged: Sequence[Judged]) -> None:
    """Fill an empty figure: accuracies, ratios, losses, a row a claim, coloured by verdict."""
    by_unit: dict[Unit, list[tuple[str, Claim]]] = {unit: [] for unit in LABELS}
    for j in judged:
        for claim in j.claims:
            by_unit[claim.unit].append((j.finding.name, claim))
    panels = [panel for panel in by_unit.values() if panel]
    figure.set_size_inches(9.0, 1.2 + ROW_INCHES * sum(len(panel) + 2 for panel in panels))
    heights = [len(panel) + 2 for panel in panels]
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        _draw(axis, panel)
    figure.suptitle(
        "Claims: estimate, 95 % interval and the bound (black) that decides\n"
        "green dot: reproduces; orange cross: does not; grey: cannot be told",
        fontsize=9,
    )


def _draw(axis: Axes, claims: Sequence[tuple[str, Claim]]) -> None:
    unit = claims[0][1].unit
    scale = 100.0 if unit == "points" else 1.0
    for row, (_, claim) in enumerate(claims):
        ends = (claim.bound - claim.margin, claim.bound + claim.margin) if claim.side == "within" else (claim.bound,)
        for end in ends:
            axis.plot([scale * end] * 2, [row - 0.4, row + 0.4], color="black", linewidth=1)
        if claim.measured is not None:
            found, (colour, marker) = claim.measured, LOOKS[claim.verdict]
            axis.plot([scale * found.low, scale * found.high], [row, row], color=colour, linewidth=2)
            axis.plot([scale * found.value], [row], marker, color=colour, markersize=6)
    axis.set_yticks(range(len(claims)), [f"{name}: {claim.text}" for name, claim in claims], fontsize=6)
    axis.set_ylim(len(claims) - 0.4, -0.6)
    axis.set_xlabel(LABELS[unit], fontsize=8)
    axis.tick_params(axis="x", labelsize=7)
    axis.grid(axis="x", alpha=0.3)
    if unit == "ratio":
        from matplotlib.ticker import LogLocator, NullLocator

        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter("{x:g}")
