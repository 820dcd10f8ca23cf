"""What `mifo compare` does, once everything heavy may be imported."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from mifo.cli import quiet_libraries
from mifo.config.decode import decode
from mifo.config.load import read_recipe
from mifo.config.schema import Config
from mifo.errors import ConfigError
from mifo.lab.arena import ArenaRun, Options
from mifo.lab.arena_compare import Comparison
from mifo.lab.arena_file import BUDGET_KINDS, Arena, BudgetConfig, check_arena, read_arena
from mifo.lab.arena_folders import compare_folders
from mifo.lab.arena_quick import quick_arena
from mifo.report.compare_files import write_files
from mifo.report.compare_plots import have_matplotlib, write_plots
from mifo.report.compare_table import print_comparison
from mifo.report.output import NO_FIGURE
from mifo.signals import EXIT_STOPPED, stopping_on_signals
from mifo.train.build import make_grader, prepare
from mifo.train.console import Screen
from mifo.train.estimate import estimate
from mifo.train.stop import Stop

EXIT_RUN_FAILED = 2
QUICK_SEEDS, QUICK_SHARE = 2, 0.5
MOST_JOBS = 2  # by default: each holds a model with its optimizers in memory


def compare_command(known: argparse.Namespace) -> int:
    """`mifo compare`: run an arena, or compare existing runs; returns the exit status."""
    quiet_libraries()
    console = Screen()
    if known.report:
        _refuse(
            known, "--report", "arena", "recipe", "methods", "seeds", "jobs", "no_tune", "keep_models", *BUDGET_KINDS
        )
        comparison = compare_folders(
            [Path(path) for path in known.report],
            reference=known.reference,
            allow_different=known.allow_different or (),
            tolerance=BudgetConfig.tolerance if known.tolerance is None else known.tolerance,
        )
        _show(console, comparison, None if known.folder is None else Path(known.folder))
        return 0
    arena = _arena(known)
    folder = Path(known.folder or Path("runs") / f"compare-{arena.name}")
    options = _options(known, folder)
    stop = Stop()
    with stopping_on_signals(stop):
        comparison = ArenaRun(arena=arena, options=options, stop=stop, say=console.print).execute()
    if comparison is None:
        console.print("stopped; runs under way are saved. Continue with the same command")
        assert stop.signal is not None
        return EXIT_STOPPED[stop.signal]
    _show(console, comparison, folder)
    return EXIT_RUN_FAILED if comparison.failures else 0


def _refuse(known: argparse.Namespace, given: str, *names: str) -> None:
    """Flags that have no effect beside another."""
    for name in names:
        if getattr(known, name) not in (None, False):
            flag = name if name == "arena" else f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} has no effect with {given}. Leave one of them out.")


def _arena(known: argparse.Namespace) -> Arena:
    if known.arena is not None:
        _refuse(known, "an arena file", "recipe", "methods")
        return _adjusted(read_arena(Path(known.arena)), known)
    if known.recipe is None or known.methods is None:
        raise ConfigError(
            "compare needs an arena file, or --recipe and --methods, or --report and run folders: mifo compare --help."
        )
    _refuse(known, "--recipe", "allow_different")
    budget = _budget(known) or _expected_budget(known.recipe)
    if known.tolerance is not None:
        budget = replace(budget, tolerance=known.tolerance)
    return quick_arena(
        known.recipe,
        [name.strip() for name in known.methods.split(",") if name.strip()],
        seeds=QUICK_SEEDS if known.seeds is None else known.seeds,
        budget=budget,
        tune=not known.no_tune,
        reference=known.reference,
    )


def _adjusted(arena: Arena, known: argparse.Namespace) -> Arena:
    """An arena file with the command's flags on top; checked like the file itself."""
    settings = arena.settings
    budget = _budget(known) or settings.budget
    tolerance = settings.budget.tolerance if known.tolerance is None else known.tolerance
    settings = replace(
        settings,
        seeds=settings.seeds if known.seeds is None else known.seeds,
        reference=known.reference or settings.reference,
        allow_different=(*settings.allow_different, *(known.allow_different or ())),
        budget=replace(budget, tolerance=tolerance),
        tuning=replace(settings.tuning, enabled=settings.tuning.enabled and not known.no_tune),
    )
    arena = replace(arena, settings=settings)
    check_arena(arena)
    return arena


def _budget(known: argparse.Namespace) -> BudgetConfig | None:
    given = {kind: getattr(known, kind) for kind in BUDGET_KINDS if getattr(known, kind) is not None}
    if len(given) > 1:
        raise ConfigError(f"--{' and --'.join(given)}: a budget is one of them. Leave the others out.")
    return decode(BudgetConfig, given) if given else None


def _expected_budget(recipe: str) -> BudgetConfig:
    """Without a budget: half the FLOPs that the recipe's steps would take if every group of rollouts were learned from."""
    config = decode(Config, read_recipe(recipe).tables)
    with make_grader(config) as grader:
        prepared = prepare(config, grader)
    expected = estimate(config, prepared.methods, prepared.corpus)
    return BudgetConfig(flops=float(f"{QUICK_SHARE * expected.flops_per_step * config.train.steps:.2g}"))


def _options(known: argparse.Namespace, folder: Path) -> Options:
    """As many processes as cores up to two, each with its share of the cores; one on a GPU."""
    cores = os.cpu_count() or 1
    jobs = known.jobs
    if jobs is None:
        jobs = 1 if torch.cuda.is_available() else min(MOST_JOBS, cores)
    if jobs < 1:
        raise ConfigError(f"--jobs {jobs}: at least one run has to go on at a time.")
    return Options(folder=folder, jobs=jobs, threads=max(1, cores // jobs), keep_models=known.keep_models)


def _show(console: Screen, comparison: Comparison, folder: Path | None) -> None:
    print_comparison(console, comparison)
    if folder is None:
        console.print("nothing was written; --folder names a place for the tables and figures")
        return
    written: Sequence[Path] = write_files(comparison, folder)
    if have_matplotlib():
        written = [*written, *write_plots(comparison, folder)]
    else:
        print(f"mifo: {NO_FIGURE}", file=sys.stderr)
    console.print(f"written to {folder}: {', '.join(path.name for path in written)}")
