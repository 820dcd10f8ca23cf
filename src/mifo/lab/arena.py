"""The arena: methods from the same checkpoint on the same data at an equal budget, each run a process that can be resumed.

    RUN of the grid of every method -> rates by validation accuracy -> final RUN of every method and seed -> measured -> compared

A folder of an arena holds runs/NAME (run folders), configs/NAME.toml, logs/NAME.log. What is finished is not run again; what
was killed is resumed; what failed is tried again at the next start, and keeps nothing else from running.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from mifo.config.decode import decode
from mifo.config.schema import Config
from mifo.errors import ConfigError
from mifo.lab.arena_compare import Budget, Comparison, compare
from mifo.lab.arena_file import Arena
from mifo.lab.arena_inputs import check_inputs
from mifo.lab.arena_jobs import Command, Job, Outcome, run_jobs, wait_until_free
from mifo.lab.arena_plan import Entry, PlannedRun, changed_setting, check_fair, final_run, make_entries, tuning_runs
from mifo.lab.arena_results import MEASURED, SUMMARY, Failure, RunResult, read_run
from mifo.lab.arena_toml import config_toml
from mifo.lab.arena_tuning import Choice, Factors, Trial, select
from mifo.train.checkpoint import read_json
from mifo.train.console import clock
from mifo.train.lock import FolderLock
from mifo.train.stop import Stop

RUNS, CONFIGS, LOGS = "runs", "configs", "logs"


@dataclass(frozen=True, kw_only=True)
class Options:
    """How an arena is run on this machine; none of it changes what is compared."""

    folder: Path
    jobs: int
    threads: int
    keep_models: bool = False


@dataclass(kw_only=True)
class ArenaRun:
    """An arena at work in its folder."""

    arena: Arena
    options: Options
    stop: Stop
    say: Callable[[str], None]
    failures: list[Failure] = field(default_factory=list)
    ended: int = 0
    planned: int = 0

    def execute(self) -> Comparison | None:
        """Run what is not finished and compare; None where `stop` was asked before the end.

        Raises:
            ConfigError: the arena is wrong, unfair, not the one that the folder holds, or names data that are not there.
            ModelError: a model is not there.
            CheckpointError: the folder is in use or cannot be written to.
        """
        entries = make_entries(self.arena, str(self.options.folder / RUNS))
        check_inputs(self.arena, entries)
        with FolderLock(self.options.folder, elsewhere="--folder"):
            trials = {e.name: tuning_runs(self.arena, e) if self.arena.settings.tuning.enabled else [] for e in entries}
            grid = [run for e in entries for run in self._of_grid(e, trials[e.name])]
            self.planned = len(grid) + len(entries) * len(self.arena.seeds)
            self.say(self._announcement(entries, trials))
            self._run(grid)
            if self.stop.requested:
                return None
            choices = [choice for e in entries if (choice := self._choose(e, trials[e.name])) is not None]
            self._run(self._final_runs(entries, choices))
            if self.stop.requested:
                return None
            return self._compare(entries, choices)

    def _announcement(self, entries: Sequence[Entry], trials: dict[str, list[tuple[Factors, PlannedRun]]]) -> str:
        budget, tuning = self.arena.settings.budget, self.arena.settings.tuning
        points = max(map(len, trials.values()))
        grid = (
            f"{points} runs each for learning rates ({tuning.budget_share:g} of the budget, on {tuning.validation})"
            if points
            else "learning rates as in the recipes (no tuning)"
        )
        return (
            f"{len(entries)} methods, {grid}, {len(self.arena.seeds)} final runs each; "
            f"{budget.kind} = {budget.amount:g} a run; {self.options.jobs} at a time, {self.options.threads} threads each"
        )

    # --- runs --------------------------------------------------------------------------------------------------------

    def _run(self, runs: Sequence[PlannedRun]) -> None:
        """Run those that are not finished."""
        for run in runs:
            self._check_folder(run)
            if self._finished(run):
                self._clear(run)  # an earlier session may not have come to it
        by_name = {run.name: run for run in runs}
        waiting = [run for run in runs if not self._finished(run)]
        self.ended += len(runs) - len(waiting)
        if len(waiting) < len(runs):
            self.say(f"{len(runs) - len(waiting)} of {len(runs)} runs are finished already")
        started, spent = time.monotonic(), [0]

        def ended(outcome: Outcome) -> None:
            self.ended += 1
            spent[0] += 1
            self._tell(by_name[outcome.name], outcome)
            left = len(waiting) - spent[0]
            if left:
                word, each = "run" if left == 1 else "runs", (time.monotonic() - started) / spent[0]
                self.say(f"  {left} {word} of this stage left, about {clock(each * left)}")

        run_jobs(
            [self._job(run) for run in waiting],
            at_once=self.options.jobs,
            threads=self.options.threads,
            stop=self.stop,
            ended=ended,
        )

    def _tell(self, run: PlannedRun, outcome: Outcome) -> None:
        place = f"[{self.ended}/{self.planned}] {run.name}"
        if outcome.reason is None:
            accuracy = read_json(self._folder(run) / SUMMARY)["accuracy_after"]
            self.say(f"{place}: {100 * accuracy:.1f} % on held-out problems, {clock(outcome.seconds)}")
            return
        log = str(self._log(run))
        self.failures.append(
            Failure(name=run.name, entry=run.entry, stage=run.stage, seed=run.seed, reason=outcome.reason, log=log)
        )
        self.say(f"{place}: FAILED: {outcome.reason}; see {log}")

    def _folder(self, run: PlannedRun) -> Path:
        return self.options.folder / RUNS / run.name

    def _log(self, run: PlannedRun) -> Path:
        return self.options.folder / LOGS / f"{run.name}.log"

    def _finished(self, run: PlannedRun) -> bool:
        """Trained and, where that is wanted, measured."""
        last = MEASURED if run.stage == "final" else SUMMARY
        return (self._folder(run) / last).is_file() and (self._folder(run) / SUMMARY).is_file()

    def _check_folder(self, run: PlannedRun) -> None:
        """A folder that holds the run of another arena is not gone on with."""
        stored = self._folder(run) / "config.json"
        if not stored.is_file():
            return
        found = changed_setting(decode(Config, read_json(stored)), run.config)
        if found is not None:
            key, old, new = found
            raise ConfigError(
                f"{stored.parent} was run with {key} = {old!r}, and the arena now says {new!r}. Choose another --folder, or put "
                "the arena back as it was."
            )
        self._check_measured(run)

    def _check_measured(self, run: PlannedRun) -> None:
        """Figures of other problems than the arena now names are made again, or refused where the model is gone."""
        path, test = self._folder(run) / MEASURED, self.arena.settings.test
        if run.stage != "final" or not path.is_file():
            return
        place = test.out_of_distribution
        wanted = {"place": place, "problems": 0 if place == "none" else test.ood_problems}
        found = read_json(path).get("ood_data", wanted)
        if found == wanted:
            return
        if not (path.parent / "export").is_dir():
            raise ConfigError(
                f"{path.parent} was measured on {found['problems']} problems of {found['place']}, and the arena now says "
                f"test.out_of_distribution = '{test.out_of_distribution}' with {test.ood_problems}; its model is not kept. "
                "Choose another --folder, or put the arena back as it was."
            )
        path.unlink()

    def _job(self, run: PlannedRun) -> Job:
        folder = self._folder(run)

        def prepare() -> list[Command]:
            wait_until_free(folder)
            commands: list[Command] = []
            if not (folder / SUMMARY).is_file():
                resume = ["--resume"] if (folder / "config.json").is_file() else []
                commands.append(["mifo.cli", "train", str(self._write_config(run)), *resume])
            if run.stage == "final":
                commands.append(["mifo.lab.arena_measure", str(folder), *self._ood()])
            return commands

        return Job(name=run.name, log=self._log(run), prepare=prepare, done=lambda: self._clear(run))

    def _clear(self, run: PlannedRun) -> None:
        """A finished run keeps its figures; its weights, several times the size of the model, only where they are wanted."""
        if not self.options.keep_models:
            for part in ("checkpoints", "export"):
                shutil.rmtree(self._folder(run) / part, ignore_errors=True)

    def _ood(self) -> list[str]:
        test = self.arena.settings.test
        if test.out_of_distribution == "none":
            return []
        return ["--ood", test.out_of_distribution, "--problems", str(test.ood_problems)]

    def _write_config(self, run: PlannedRun) -> Path:
        path = self.options.folder / CONFIGS / f"{run.name}.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        config = replace(run.config, train=replace(run.config.train, threads=self.options.threads))
        path.write_text(config_toml(config, f"{run.entry} in the arena {self.arena.name}"), encoding="utf-8")
        return path

    # --- results -----------------------------------------------------------------------------------------------------

    def _choose(self, entry: Entry, points: Sequence[tuple[Factors, PlannedRun]]) -> Choice | None:
        """The rates of an entry; None where all of its grid failed."""
        if not points:
            rates = final_run(entry, 0).rates
            return Choice(entry=entry.name, factors=(1.0, 1.0), rates=rates, optimizers=entry.optimizers)
        trials = tuple(self._trial(factors, run) for factors, run in points)
        begun = self._begun_with(entry, points)
        best = next((trial for trial in trials if trial.factors == begun), None) or select(trials)
        if best is None:
            self.say(f"{entry.name}: no run for its learning rates finished, so it has no final runs")
            return None
        choice = Choice(
            entry=entry.name, factors=best.factors, rates=best.rates, optimizers=entry.optimizers, trials=trials
        )
        self.say(f"{entry.name}: learning rate {choice.describe()}")
        return choice

    def _of_grid(self, entry: Entry, points: Sequence[tuple[Factors, PlannedRun]]) -> list[PlannedRun]:
        """The runs of a grid that decide anything: all, but for failed ones of a method whose final runs have begun."""
        begun = self._begun_with(entry, points) is not None
        return [run for _, run in points if not begun or self._finished(run)]

    def _begun_with(self, entry: Entry, points: Sequence[tuple[Factors, PlannedRun]]) -> Factors | None:
        """The rates of final runs that the grid decided: a point of it that failed before them no longer changes the choice.

        Final runs of an arena that had no grid yet (`--no-tune`) decide nothing.
        """
        if not any(self._finished(run) for _, run in points):
            return None
        stored = [self._folder(final_run(entry, seed)) / "config.json" for seed in self.arena.seeds]
        for config in [decode(Config, read_json(path)) for path in stored if path.is_file()]:
            for factors, _ in points:
                seeded = final_run(entry, config.train.seed, factors)
                if changed_setting(config, seeded.config) is None:
                    return factors
        return None

    def _trial(self, factors: Factors, run: PlannedRun) -> Trial:
        if not self._finished(run):
            return Trial(factors=factors, rates=run.rates, accuracy=None)
        result = read_run(self._folder(run), run.entry)
        accuracy = result.accuracy if result.whole else None  # without its last stage it says nothing of the rates
        return Trial(factors=factors, rates=run.rates, accuracy=accuracy, flops=result.flops)

    def _final_runs(self, entries: Sequence[Entry], choices: Sequence[Choice]) -> list[PlannedRun]:
        """Seed by seed, so that an arena that is stopped early has some of every method."""
        factors = {choice.entry: choice.factors for choice in choices}
        return [
            final_run(entry, seed, factors[entry.name])
            for seed in self.arena.seeds
            for entry in entries
            if entry.name in factors
        ]

    def _compare(self, entries: Sequence[Entry], choices: Sequence[Choice]) -> Comparison:
        settings = self.arena.settings
        finished = [run for run in self._final_runs(entries, choices) if self._finished(run)]
        results: list[RunResult] = [read_run(self._folder(run), run.entry) for run in finished]
        return compare(
            results,
            entries=[entry.name for entry in entries],
            reference=self.arena.reference,
            budget=Budget(
                kind=settings.budget.kind, amount=settings.budget.amount, tolerance=settings.budget.tolerance
            ),
            name=self.arena.name,
            description=settings.description,
            failures=self.failures,
            choices=choices,
            tuned=settings.tuning.enabled,
            notes=[
                *check_fair({entry.name: entry.config for entry in entries}, settings.allow_different),
                *(entry.note for entry in entries if entry.note),
            ],
        )
