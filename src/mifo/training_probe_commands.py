"""What the probes that train do: make the runs, write, show. Each is resumed by the same command."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
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
from mifo.lab.claims import Claim, expected, figure
from mifo.lab.forgetting import OBJECTIVES, Forgetting, ForgettingSettings, forgetting
from mifo.lab.sparsify_online import OnlineSettings, OnlineSparsification, sparsify_online
from mifo.lab.training_plan import Workplace
from mifo.lab.trials import TrialFailure
from mifo.report.compare_text import percent
from mifo.report.output import write_outputs
from mifo.report.training_figures import draw_bugs, draw_forgetting, draw_online
from mifo.signals import EXIT_STOPPED, stopping_on_signals
from mifo.train.console import Screen
from mifo.train.embedded import EMBEDDED
from mifo.train.manifest import MANIFEST
from mifo.train.mini import MINI
from mifo.train.stop import Stop
from mifo.training_probe_verbs import ONLINE_RECIPE, ONLINE_SEEDS, check_steps, refuse_flags

EXIT_RUN_FAILED = 2
WARMUP = {EMBEDDED: 24, MINI: 80}  # SFT steps, of 16 demonstrations unless told otherwise
MOST_JOBS = 2  # by default: each holds a model with its optimizers in memory


class Measured(Protocol):
    """What a probe that trains finds."""

    @property
    def claims(self) -> tuple[Claim, ...]: ...

    @property
    def notes(self) -> tuple[str, ...]: ...

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


def forgetting_command(known: argparse.Namespace) -> int:
    """`mifo probe forgetting`."""
    check_steps(known, "steps", "seeds", "jobs", "warmup")
    settings = ForgettingSettings(
        objectives=tuple(dict.fromkeys(known.objectives or OBJECTIVES)),
        seeds=known.seeds,
        rl_steps=known.rl_steps,
        steps=known.steps,
        batch_size=known.batch_size,
        start=_folder(known.start),
    )
    return _carry_out(
        known,
        "forgetting",
        lambda config, place: forgetting(
            config, place, replace(settings, warmup=_warmup(known, settings.start, config))
        ),
        _forgetting_table,
        draw_forgetting,
    )


def sparsify_online_command(known: argparse.Namespace) -> int:
    """`mifo probe sparsify --online`."""
    if known.start is not None:
        raise ConfigError(
            "START and MODEL have no effect with --online, which trains. Name a model with --start-model."
        )
    defaults = {
        "masks": 3,
        "seed": 0,
        "data": "embedded",
        "split": None,
        "limit": 200,
        "samples": 1,
        "temperature": 0.0,
    }
    defaults |= {"max_tokens": 512, "template": None, "system_prompt": None, "device": "auto"}
    refuse_flags(known, "with --online", defaults)
    check_steps(known, "steps", "seeds", "jobs", "batch_size", "warmup")
    known.recipe = known.recipe or ONLINE_RECIPE
    settings = OnlineSettings(
        rates=OnlineSettings().rates if known.rates is None else tuple(known.rates),
        seeds=known.seeds or ONLINE_SEEDS,
        steps=known.steps,
        batch_size=known.batch_size or OnlineSettings().batch_size,
        start=_folder(known.start_model),
    )
    return _carry_out(
        known,
        "sparsify-online",
        lambda config, place: sparsify_online(
            config, place, replace(settings, warmup=_warmup(known, settings.start, config))
        ),
        _online_table,
        draw_online,
    )


def _warmup(known: argparse.Namespace, start: str | None, config: Config) -> int:
    """SFT steps before RL: as asked for, or what makes a model able that ships and solves nothing."""
    if known.warmup is not None:
        return int(known.warmup)
    return 0 if start is not None else WARMUP.get(config.model.path, 0)


def _folder(model: str | None) -> str | None:
    """A model as runs anywhere find it; the export of a finished run where one is named.

    Raises:
        ConfigError: it is a checkpoint, from which runs do not begin.
    """
    if model is None:
        return None
    place = Path(model).expanduser()
    if (place / MANIFEST).is_file():
        raise ConfigError(
            f"'{model}' is a checkpoint of a run, which is no model in Hugging Face format. Finish its run with --resume and "
            "name that, or its export."
        )
    if (place / "export").is_dir():
        place = place / "export"
    return str(place.resolve()) if place.is_dir() else model


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
    screen.print(_claims_table(found.claims))
    for note in found.notes:
        screen.print(note)
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


def _claims_table(claims: Sequence[Claim]) -> Table:
    table = Table("the paper's claim", "there", "measured here", "reproduces where", "verdict", title="Claims")
    for claim in claims:
        table.add_row(claim.text, claim.paper, figure(claim), expected(claim), claim.verdict)
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


def _forgetting_table(found: Forgetting) -> Table:
    settings = found.settings
    table = Table(
        "objective", "seeds", "after RL (%)", "after it (%)", "change", "against ce",
        title=f"{settings.steps} steps of each objective after {settings.rl_steps} of RL",
    )  # fmt: skip
    for row in found.table:
        change, against = percent(row.change, signed=True), percent(row.against_ce, signed=True)
        table.add_row(
            row.objective, str(row.seeds), f"{100 * row.before:.1f}", f"{100 * row.after:.1f}", change, against
        )
    return table


def _online_table(found: OnlineSparsification) -> Table:
    table = Table("training", "dropped", "seeds", "accuracy (%)", "lost", title="Accuracy with gradients dropped")
    for row in found.table:
        cells = [percent(row.accuracy), percent(row.cost, signed=True)]
        table.add_row(row.kind.upper(), f"{100 * row.rate:g} %", str(row.seeds), *cells)
    return table
