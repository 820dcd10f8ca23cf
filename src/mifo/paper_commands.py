"""What `mifo paper` does, once everything heavy may be imported."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from mifo import __version__
from mifo.cli import quiet_libraries
from mifo.errors import ConfigError
from mifo.lab.paper.finding import Finding, Judged
from mifo.lab.paper.plan import Plan
from mifo.lab.paper.run_table import run_rows
from mifo.lab.paper.suite import Options, chosen, recorded, run_suite, suite_record
from mifo.lab.paper.tier import TIERS, Tier
from mifo.report.output import NO_FIGURE, new_figure, table_text
from mifo.report.paper_page import claims_csv, page, print_findings
from mifo.report.paper_plot import draw_claims
from mifo.signals import EXIT_STOPPED, stopping_on_signals
from mifo.train.console import Screen
from mifo.train.stop import Stop
from mifo.train.storage import Storage, replace_file

EXIT_RUN_FAILED = 2
MOST_JOBS = 2  # by default: each holds a model with its optimizers in memory


def paper_command(known: argparse.Namespace) -> int:
    """`mifo paper`: run the findings asked for and write the page; returns the exit status."""
    quiet_libraries()
    console = Screen()
    tier = TIERS[known.tier]
    findings = chosen(None if known.only is None else [n.strip() for n in known.only.split(",") if n.strip()])
    if known.list:
        _list(console, tier, findings)
        return 0
    options = _options(known)
    logging.getLogger("mifo").setLevel(logging.WARNING)  # measurements would name the engine of every pruned model
    stop = Stop()
    _check_arena(options, findings)

    def write() -> list[Path]:
        """The page of all that the folder holds, findings of earlier calls included."""
        return _write(tier, recorded(tier, options, say=console.print), options)

    with stopping_on_signals(stop):
        judged = run_suite(tier, findings, options, stop=stop, say=console.print, judged_one=write)
    if judged is None:
        console.print("stopped; runs under way are saved. Continue with the same command")
        assert stop.signal is not None
        return EXIT_STOPPED[stop.signal]
    print_findings(console, judged)
    written = write()
    console.print(f"written to {options.folder}: {', '.join(path.name for path in written)}")
    return EXIT_RUN_FAILED if any(one.failed for one in judged) else 0


def _check_arena(options: Options, findings: Sequence[Finding]) -> None:
    if options.arena is None:
        return
    if not options.arena.is_dir():
        raise ConfigError(
            f"--arena = '{options.arena}' is no folder. Name that of a finished arena, or leave --arena out."
        )
    if not any(finding.in_arena for finding in findings):
        able = ", ".join(finding.name for finding in chosen(None) if finding.in_arena)
        raise ConfigError(
            f"--arena = '{options.arena}' has no effect: none of {', '.join(f.name for f in findings)} can be judged by an "
            f"arena's runs. It goes with {able}."
        )


def _list(console: Screen, tier: Tier, findings: Sequence[Finding]) -> None:
    plan = Plan(tier=tier, folder=Path())
    for finding in findings:
        runs = len({trial.name for trial in finding.trials(plan)})
        console.print(f"{finding.name:22} {finding.source:28} {runs:4} runs  {finding.claim}", soft_wrap=True)
    console.print(
        f"{len(findings)} findings, {len(plan.made)} runs with those that others begin from; tier {tier.name}"
    )


def _options(known: argparse.Namespace) -> Options:
    cores = os.cpu_count() or 1
    jobs = known.jobs
    if jobs is None:
        jobs = 1 if torch.cuda.is_available() else min(MOST_JOBS, cores)
    if jobs < 1:
        raise ConfigError(f"--jobs {jobs}: at least one run has to go on at a time.")
    folder = Path(known.folder or Path("runs") / f"paper-{known.tier}")
    arena = None if known.arena is None else Path(known.arena)
    return Options(folder=folder, jobs=jobs, threads=max(1, cores // jobs), arena=arena, machine=_machine(jobs))


def _write(tier: Tier, judged: Sequence[Judged], options: Options) -> list[Path]:
    contents = {
        "paper.md": page(tier, judged),
        "paper.csv": claims_csv(judged),
        "paper.json": json.dumps(suite_record(tier, judged), indent=1),
    }
    runs = run_rows(Plan(tier=tier, folder=options.folder), [one.finding for one in judged])
    if runs:
        contents["runs.csv"] = table_text(runs)
    for name, text in contents.items():
        replace_file(Storage(), options.folder / name, text.encode("utf-8"))
    written = [options.folder / name for name in contents]
    figure = new_figure()
    if figure is None:
        print(f"mifo: {NO_FIGURE}", file=sys.stderr)
        return written
    draw_claims(figure, judged)
    figure.savefig(options.folder / "paper.png", dpi=150)
    return [*written, options.folder / "paper.png"]


def _machine(jobs: int) -> str:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return (
        f"mifo {__version__}, torch {torch.__version__}, transformers {transformers.__version__}, Python "
        f"{platform.python_version()}, {device}, {os.cpu_count()} cores, {jobs} {'run' if jobs == 1 else 'runs'} at a time."
    )
