"""A comparison as files: methods.csv, runs.csv, comparison.json, table.txt."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mifo.config.decode import encode
from mifo.lab.arena_compare import FIGURES, Comparison, Row
from mifo.lab.arena_results import RunResult
from mifo.lab.arena_statistics import Estimate
from mifo.printable import printable
from mifo.report.compare_table import print_comparison
from mifo.report.compare_text import remarks
from mifo.train.console import Screen
from mifo.train.storage import Storage, replace_file

TABLE_WIDTH = 180


def write_files(comparison: Comparison, folder: Path) -> list[Path]:
    """Write all files; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "methods.csv": _csv(method_records(comparison)),
        "runs.csv": _csv(run_records(comparison)),
        "comparison.json": json.dumps(plain(comparison), indent=2, ensure_ascii=False),
        "table.txt": table_text(comparison),
    }
    for name, text in contents.items():
        replace_file(Storage(), folder / name, text.encode("utf-8"))
    return [folder / name for name in contents]


def table_text(comparison: Comparison, width: int = TABLE_WIDTH) -> str:
    """What the terminal shows, without colours."""
    text = io.StringIO()
    print_comparison(Screen(file=text, width=width), comparison)
    return text.getvalue()


def method_records(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """One flat record a method; intervals as NAME, NAME_low, NAME_high."""
    for row in comparison.rows:
        record: dict[str, Any] = {
            "rank": row.rank,
            "method": row.entry,
            "runs": len(row.runs),
            "runs_within_budget": len(row.counted),
            "runs_failed": len(row.failures),
        }
        for name, estimate in _estimates(row):
            ends = (None, None, None) if estimate is None else (estimate.value, estimate.low, estimate.high)
            record |= dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))
        yield record


def _estimates(row: Row) -> Iterator[tuple[str, Estimate | None]]:
    yield "accuracy", row.accuracy
    yield "accuracy_difference", row.difference
    yield "ood_accuracy", row.ood
    yield "ood_accuracy_difference", row.ood_difference
    for name in FIGURES:
        yield name, row.figures.get(name)


def run_records(comparison: Comparison) -> Iterator[dict[str, Any]]:
    """One flat record a run, failed ones included."""
    for row in comparison.rows:
        for run in row.runs:
            yield _run_record(run, comparison)
        for failure in row.failures:
            yield {
                "method": failure.entry,
                "seed": failure.seed,
                "run": failure.name,
                "status": f"failed: {failure.reason}",
            }


def _run_record(run: RunResult, comparison: Comparison) -> dict[str, Any]:
    budget = comparison.budget
    return {
        "method": run.entry,
        "seed": run.seed,
        "run": run.name,
        "status": "within budget" if budget.keeps(run) else "outside budget" if run.whole else "without its last stage",
        "budget_deviation": budget.deviation(run),
        "accuracy": run.accuracy,
        "ood_accuracy": run.ood_accuracy,
        **{name: getter(run) for name, getter in FIGURES.items()},
        "rl_learning_rate": run.rates[0],
        "sft_learning_rate": run.rates[1],
    }


def _csv(records: Iterator[Mapping[str, Any]]) -> str:
    rows = list(records)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def plain(comparison: Comparison) -> dict[str, Any]:
    """Everything, single problems included, as JSON has it."""
    return {
        "name": comparison.name,
        "description": comparison.description,
        "reference": comparison.reference,
        "budget": asdict(comparison.budget),
        "tuned": comparison.tuned,
        "tuning_flops": comparison.tuning_flops,
        "seeds": list(comparison.seeds),
        "remarks": [printable(remark) for remark in remarks(comparison)],
        "methods": [
            {
                "method": row.entry,
                "rank": row.rank,
                **{name: None if e is None else asdict(e) for name, e in _estimates(row)},
                "learning_rates": None if row.choice is None else asdict(row.choice),
                "runs": [_run_plain(run, comparison) for run in row.runs],
                "failures": [asdict(failure) for failure in row.failures],
            }
            for row in comparison.rows
        ],
    }


def _run_plain(run: RunResult, comparison: Comparison) -> dict[str, Any]:
    return _run_record(run, comparison) | {
        "sft_phases": [asdict(phase) for phase in run.phases],
        "curve": [{"flops": flops, "accuracy": accuracy} for flops, accuracy in run.curve],
        "by_problem": dict(run.by_problem),
        "ood_by_problem": None if run.ood is None else dict(run.ood),
        "config": encode(run.config),
    }
