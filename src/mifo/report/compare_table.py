"""A comparison in the terminal: accuracy and differences, then what it cost, then what limits it."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from mifo.lab.arena_compare import Comparison, Row
from mifo.report.compare_text import mean, percent, remarks, seeds_of

UNRANKED = "–"


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Both tables and the remarks."""
    console.print(accuracy_table(comparison))
    console.print(cost_table(comparison))
    for remark in remarks(comparison):
        console.print(f"· {remark}", soft_wrap=True)


def accuracy_table(comparison: Comparison) -> Table:
    """One row a method, best first."""
    title = f"{comparison.name}: {comparison.description}" if comparison.description else comparison.name
    table = Table(title=title, title_justify="left")
    against = f"less {comparison.reference}"
    for column in ("#", "method", "accuracy, %", against, "other kinds, %", against, "seeds"):
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=column == "method")
    for row in comparison.rows:
        table.add_row(
            UNRANKED if row.rank is None else str(row.rank),
            row.entry,
            percent(row.accuracy),
            "reference" if row.entry == comparison.reference else percent(row.difference, signed=True),
            percent(row.ood),
            "reference" if row.entry == comparison.reference else percent(row.ood_difference, signed=True),
            seeds_of(row),
            style=_style(row, comparison),
        )
    return table


def cost_table(comparison: Comparison) -> Table:
    """One row a method: means over seeds of what training did and used."""
    caption = (
        "length: tokens an answer; forgot: accuracy lost in an SFT phase; moved: change of the weights by their norm; prompts, "
        "demos: different ones"
    )
    table = Table(
        title="Means over seeds",
        title_justify="left",
        caption=caption,
        caption_justify="left",
        box=SIMPLE_HEAD,  # ten columns without lines between them fit into 80 characters
        padding=(0, 1, 0, 0),
    )
    columns = ("method", "length", "cut %", "forgot %", "moved %", "prompts", "demos", "steps", "FLOPs", "min")
    for column in columns:
        table.add_column(column, justify="left" if column == "method" else "right", no_wrap=column == "method")
    for row in comparison.rows:
        table.add_row(
            row.entry,
            mean(row, "response_length"),
            mean(row, "truncated", ".1f", 100),
            mean(row, "forgotten_per_sft_phase", "+.1f", 100),
            mean(row, "relative_movement", ".2g", 100),
            mean(row, "unique_problems"),
            mean(row, "unique_demonstrations"),
            mean(row, "steps"),
            mean(row, "flops", ".1e"),
            mean(row, "minutes", ".1f"),
            style=_style(row, comparison),
        )
    return table


def _style(row: Row, comparison: Comparison) -> str | None:
    if row.rank is None:
        return "dim"
    return "bold" if row.entry == comparison.reference else None
