"""What a comparison looks like: the words of its table, its files, its figures."""

import csv
import dataclasses
import io
import json

import numpy as np
import pytest
from arena_runs import make_result
from rich.console import Console

from mifo.lab.arena_compare import Budget, compare
from mifo.lab.arena_results import Failure
from mifo.lab.arena_tuning import Choice, Trial
from mifo.report.compare_files import table_text, write_files
from mifo.report.compare_plots import mean_curve
from mifo.report.compare_table import cost_table
from mifo.report.compare_text import remarks

GRID = (
    Trial(factors=(1.0, 1.0), rates=(1e-3, 2e-3), accuracy=0.5, flops=3e11),
    Trial(factors=(2.0, 2.0), rates=(2e-3, 4e-3), accuracy=None),
)


@pytest.fixture
def comparison():
    """Two methods in the budget, one with a run outside it, one that failed."""
    runs = [
        make_result("mifo", 0, (1, 1, 0, 0), ood=(1, 0, 0, 0)),
        make_result("mifo", 1, (1, 1, 1, 0), ood=(1, 1, 0, 0)),
        make_result("sft", 0, (1, 0, 0, 0), ood=(0, 0, 0, 0), phases=()),
        make_result("sft", 1, (1, 1, 1, 1), ood=(0, 0, 0, 0), phases=(), flops=1.2e12),
    ]
    failure = Failure(
        name="grpo-seed0", entry="grpo", stage="final", seed=0, reason="no memory (signal 9)", log="logs/g.log"
    )
    return compare(
        runs,
        entries=["mifo", "sft", "grpo"],
        reference="mifo",
        budget=Budget(kind="flops", amount=1e12, tolerance=0.05),
        name="demo",
        description="a test",
        failures=[failure],
        choices=[Choice(entry="mifo", factors=(1.0, 1.0), rates=(1e-3, 2e-3), optimizers=("rl", "sft"), trials=GRID)],
        tuned=True,
        notes=["something to know"],
    )


def test_the_table_says_who_is_better_and_how_sure(comparison):
    text = table_text(comparison)
    line = next(line for line in text.splitlines() if line.startswith("│ 1 "))
    assert " mifo " in line
    assert "62.5 [" in line
    assert "reference" in line
    assert "37.5 [" in line  # of other kinds
    line = next(line for line in text.splitlines() if line.startswith("│ 2 "))
    assert " sft " in line
    assert "25.0 [" in line
    assert "-25.0 [" in line
    assert "1 of 2" in line  # both runs of sft finished, one counts
    line = next(line for line in text.splitlines() if line.startswith("│ – "))
    assert " grpo " in line


def test_everything_that_limits_the_table_is_said(comparison):
    said = "\n".join(remarks(comparison))
    assert "failed: grpo-seed0 (final): no memory (signal 9); see logs/g.log" in said
    assert "grpo has no finished run" in said
    assert "outside the budget: sft-seed1 spent 1.2e+12 flops, +20.0 % of 1e+12 (tolerance 5 %); not ranked" in said
    assert "one seed" in said
    assert "not corrected" in said
    assert "the best of 2 points a method on validation problems" in said
    assert "mifo: 1 of 2 points of its grid failed" in said
    assert "Rates chosen: mifo rl 0.001, sft 0.002." in said
    assert said.endswith("something to know")
    for line in remarks(comparison):
        assert line.split()[0] in " ".join(table_text(comparison).split())


def test_no_tuning_is_said(comparison):
    plain = dataclasses.replace(comparison, tuned=False)
    assert any("not tuned (--no-tune)" in line for line in remarks(plain))
    assert not any("rates" in line for line in remarks(dataclasses.replace(comparison, tuned=None)))


def test_few_seeds_are_said(comparison):
    two = compare(
        [make_result("a", s) for s in range(2)] + [make_result("b", s) for s in range(2)],
        entries=["a", "b"], reference="a", budget=comparison.budget, name="x", tuned=None,
    )  # fmt: skip
    assert any(line.startswith("2 seeds say little") and "9.2 times" in line for line in remarks(two))


def test_files(comparison, tmp_path):
    paths = write_files(comparison, tmp_path / "out")
    assert [path.name for path in paths] == ["methods.csv", "runs.csv", "comparison.json", "table.txt"]
    methods = list(csv.DictReader(io.StringIO((tmp_path / "out" / "methods.csv").read_text())))
    assert [row["method"] for row in methods] == ["mifo", "sft", "grpo"]
    assert [row["rank"] for row in methods] == ["1", "2", ""]
    assert float(methods[0]["accuracy"]) == 0.625
    assert float(methods[0]["accuracy_low"]) <= 0.625 <= float(methods[0]["accuracy_high"])
    assert float(methods[1]["accuracy_difference"]) == -0.25
    assert methods[1]["forgotten_per_sft_phase"] == ""
    runs = list(csv.DictReader(io.StringIO((tmp_path / "out" / "runs.csv").read_text())))
    assert [(row["run"], row["status"]) for row in runs] == [
        ("mifo-seed0", "within budget"), ("mifo-seed1", "within budget"), ("sft-seed0", "within budget"),
        ("sft-seed1", "outside budget"), ("grpo-seed0", "failed: no memory (signal 9)"),
    ]  # fmt: skip
    record = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert record["methods"][0]["runs"][0]["by_problem"] == {"p0": 1.0, "p1": 1.0, "p2": 0.0, "p3": 0.0}
    assert record["methods"][0]["accuracy"]["seeds"] == 2
    assert record["methods"][0]["learning_rates"]["trials"][1]["accuracy"] is None
    assert "something to know" in record["remarks"]
    assert (tmp_path / "out" / "table.txt").read_text() == table_text(comparison)


def test_costs_are_whole_in_a_terminal_of_80_columns(comparison):
    console = Console(width=80, file=io.StringIO())
    console.print(cost_table(comparison))
    text = console.file.getvalue()
    assert "…" not in text
    assert all(word in text for word in ("prompts", "forgot %", "FLOPs", "1.0e+12"))


def test_text_from_outside_is_made_printable(comparison):
    bad = dataclasses.replace(comparison, description="\x1b[31mred", notes=("\x1b]0;title\x07",))
    assert "\x1b" not in table_text(bad)


def test_the_mean_of_curves_is_where_all_have_points():
    grid, mean = mean_curve([np.array([[0.0, 0.0], [10.0, 1.0]]), np.array([[0.0, 0.0], [5.0, 1.0], [8.0, 1.0]])])
    assert grid.tolist() == [0.0, 5.0, 8.0]
    assert mean.tolist() == [0.0, pytest.approx(0.75), pytest.approx(0.9)]


def test_figures(comparison, tmp_path):
    pytest.importorskip("matplotlib", reason="figures need the extra `report`")
    from mifo.report.compare_plots import accuracy_figure, forgetting_figure, write_plots

    assert [path.name for path in write_plots(comparison, tmp_path)] == ["accuracy.png", "forgetting.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in tmp_path.iterdir())
    (axes,) = accuracy_figure(comparison).axes
    labels = [line.get_label() for line in axes.lines if not line.get_label().startswith("_")]
    assert labels == ["1  mifo", "2  sft"]
    panels = forgetting_figure(comparison).axes
    assert [panel.get_title(loc="left") for panel in panels] == ["mifo: mean +0.0"]  # sft measured no phase
    empty = dataclasses.replace(comparison, rows=comparison.rows[1:])
    assert forgetting_figure(empty) is None
