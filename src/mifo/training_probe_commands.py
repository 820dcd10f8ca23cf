"""What the probes that train do: make the runs, write, show. Each is resumed by the same command."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from rich.table import Table

from mifo.cli import quiet_libraries
from mifo.config.load import load_config
from mifo.config.schema import Config
from mifo.errors import ConfigError
from mifo.lab.arena_statistics import Estimate
from mifo.lab.bugs import BugRow, Bugs, BugSettings, bugs
from mifo.lab.findings import Finding
from mifo.lab.training_plan import Workplace
from mifo.lab.trials import TrialFailure
from mifo.report.compare_text import percent
from mifo.report.output import write_outputs
from mifo.report.training_figures import draw_bugs
from mifo.signals import EXIT_STOPPED, stopping_on_signals
from mifo.train.console import Screen
from mifo.train.stop import Stop
from mifo.training_probe_verbs import check_steps

EXIT_RUN_FAILED = 2
MOST_JOBS = 2  # by default: each holds a model with its optimizers in memory


class Measured(Protocol):
    """What a probe that trains finds."""

    @property
    def findings(self) -> tuple[Finding, ...]: ...

    @property
    def failures(self) -> tuple[TrialFailure, ...]: ...

    def record(self) -> dict[str, Any]: ...

    def rows(self) -> list[dict[str, Any]]: ...


Found = TypeVar("Found", bound=Measured)


def bugs_command(known: argparse.Namespace) -> int:
    """`mifo probe bugs`."""
    check_steps(known, "steps", "seeds", "jobs")
    settings = BugSettings(
        seeds=known.seeds,
        steps=known.steps,
        batch_size=known.batch_size,
        ranks=known.ranks,
        micro_batches=known.micro_batches,
    )
    return _carry_out(known, "bugs", lambda config, place: bugs(config, place, settings), _bugs_table, draw_bugs)


def _carry_out(
    known: argparse.Namespace,
    name: str,
    measure: Callable[[Config, Workplace], Found | None],
    tabulate: Callable[[Found], Table],
    draw: Callable[[Any, Found], None],
) -> int:
    """Make the runs in OUT/NAME-runs, then write and show; returns the exit status."""
    quiet_libraries()
    screen, stop, out = Screen(), Stop(), Path(known.out).expanduser()
    _, config = load_config(known.recipe)
    jobs, threads = _processes(known.jobs)
    place = Workplace(folder=out / f"{name}-runs", jobs=jobs, threads=threads, stop=stop, say=screen.print)
    with stopping_on_signals(stop):
        found = measure(config, place)
    if stop.signal is not None:
        screen.print("stopped; runs under way are saved. Continue with the same command")
        return EXIT_STOPPED[stop.signal]
    if found is None:
        screen.print(f"nothing to compare: too many runs failed; see the logs in {place.folder / 'logs'}")
        return EXIT_RUN_FAILED
    screen.print(tabulate(found))
    screen.print(_findings_table(found.findings))
    screen.print("Brackets are 95 % intervals over seeds and, for accuracies, problems; differences are paired.")
    for failure in found.failures:
        screen.print(f"failed: {failure.name}: {failure.reason}; see {failure.log}. The same command tries it again")
    lines = write_outputs(out, name, record=found.record(), rows=found.rows(), draw=lambda figure: draw(figure, found))
    for line in [*lines, f"{place.folder} (the runs; the same command does not repeat them)"]:
        screen.print(line)
    return EXIT_RUN_FAILED if found.failures else 0


def _processes(jobs: int | None) -> tuple[int, int]:
    """Runs at a time, and threads of each: the cores are shared out."""
    cores = os.cpu_count() or 1
    if jobs is None:
        jobs = 1 if torch.cuda.is_available() else min(MOST_JOBS, cores)
    return jobs, max(1, cores // jobs)


def _findings_table(findings: Sequence[Finding]) -> Table:
    table = Table("the paper's claim", "there", "measured here", "verdict", title="Findings")
    for one in findings:
        table.add_row(one.claim, one.source, one.measured, one.verdict)
    return table


def number(estimate: Estimate | None, form: str = ".3g", scale: float = 1.0) -> str:
    """A figure with its interval; a dash where there is none."""
    if estimate is None:
        return "–"
    value, low, high = (format(scale * x, form) for x in (estimate.value, estimate.low, estimate.high))
    return f"{value} [{low}, {high}]"


def _bugs_table(found: Bugs) -> Table:
    settings = found.settings
    title = (
        f"SFT, {settings.batch_size} demonstrations an update on {settings.ranks} ranks of {settings.micro_batches} "
        "micro-batches"
    )
    table = Table(
        "reduction", "seeds", "accuracy (%)", "against correct", "loss at the end", "held-out loss", "gradient norm",
        title=title,
    )  # fmt: skip
    for row in found.table:
        table.add_row(*_bugs_cells(row))
    return table


def _bugs_cells(row: BugRow) -> list[str]:
    return [
        row.variant,
        str(row.seeds),
        percent(row.accuracy),
        percent(row.accuracy_difference, signed=True),
        number(row.loss),
        number(row.held_out_loss),
        number(row.norm),
    ]


def refuse_flags(known: argparse.Namespace, given: str, defaults: dict[str, Any]) -> None:
    """Flags that have no effect beside another.

    Raises:
        ConfigError: one of them was set to something else than its default.
    """
    for name, default in defaults.items():
        if getattr(known, name) != default:
            raise ConfigError(f"--{name.replace('_', '-')} has no effect {given}. Leave it out.")
