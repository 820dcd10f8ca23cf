"""Small sets of training runs as processes in a folder: what is not finished is run, what is finished is read.

    start = Trial(name="rl-seed0", config=rl)                        # a whole configuration each, from load_config
    sft   = Trial(name="ce-seed0", config=ce, after=start)           # begins with the weights that `start` exported
    done  = run_trials([sft], folder, jobs=2, threads=1, stop=Stop(), say=print)
    done.results["ce-seed0"].after.accuracy                          # also of rl-seed0, which was run first
    done.failures                                                    # with the end of their logs; they stop no others
    done.complete                                                    # nothing failed and nobody asked to stop

- `run_trials` adds the trials that others begin from, checks every configuration before the first process, and runs `jobs` at a
  time with `threads` threads each, as the arena does. A trial is a `mifo train` of its own, or what `Trial.command` names.
- The folder holds runs/NAME (run folders), configs/NAME.toml and logs/NAME.log. A finished trial is not run again; one that was
  killed or stopped is resumed; a failed one is tried again at the next call, and those that begin from it fail with it.
- A trial that begins from another has model.path set to its export. Exports go once nothing needs them any more, unless
  `keep_export` asks for them; checkpoints go at a trial's end. A finished trial whose export is wanted again is trained again.
- A folder in which a name stands for another configuration is refused.
- `read_trial` reads a finished run folder as one frozen record; `scores` gives `arena_statistics` what it takes, so an interval
  of a method over seeds is `share_interval(score_table(runs, seeds, problems))`, and a paired one `paired_difference(a, b)`.

A configuration's run.folder, run.name, run.export, run.keep_* and train.threads are set here; all others are its own.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mifo.config.check import check_config
from mifo.config.decode import decode
from mifo.config.load import read_toml
from mifo.config.schema import Config
from mifo.errors import ConfigError
from mifo.lab.arena_jobs import Command, Job, Outcome, run_jobs, wait_until_free
from mifo.lab.arena_plan import changed_setting
from mifo.lab.arena_results import SUMMARY
from mifo.lab.arena_toml import config_toml
from mifo.lab.trial_results import EXPORT, Evaluation, TrialResult, read_trial, scores
from mifo.train.checkpoint import read_json
from mifo.train.console import clock
from mifo.train.folder import CONFIG
from mifo.train.lock import FolderLock
from mifo.train.stop import Stop

__all__ = ["Evaluation", "Trial", "TrialFailure", "TrialResult", "Trials", "read_trial", "run_trials", "scores"]

RUNS, CONFIGS, LOGS = "runs", "configs", "logs"
TRAIN = ("mifo.cli", "train")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run.

    Attributes:
        name: of its folder; letters, digits, dots, dashes.
        config: whole; see the module for what is set in it.
        after: the trial whose export is the model that this one begins with, in place of model.path.
        keep_export: keep the exported model for later measurements.
        command: a module and arguments that train as `mifo train CONFIG.toml [--resume]` does; both are put behind them.
    """

    name: str
    config: Config
    after: Trial | None = None
    keep_export: bool = False
    command: Command = TRAIN

    @property
    def lineage(self) -> tuple[Trial, ...]:
        """The trials that it comes from and itself, the first of them first."""
        return (self,) if self.after is None else (*self.after.lineage, self)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialFailure:
    """A trial that did not come to its end, with what its log says last."""

    name: str
    reason: str
    log: Path


@dataclass(frozen=True, kw_only=True)
class Trials:
    """What a call of `run_trials` leaves: results of all that are finished, by name, in the order asked for."""

    results: Mapping[str, TrialResult]
    failures: tuple[TrialFailure, ...]
    stopped: bool

    @property
    def complete(self) -> bool:
        """Every trial is finished."""
        return not self.failures and not self.stopped


def run_trials(
    trials: Sequence[Trial],
    folder: Path,
    *,
    jobs: int,
    threads: int,
    stop: Stop,
    say: Callable[[str], None],
    flag: str = "--out",
) -> Trials:
    """Run what is not finished, and read what is.

    Args:
        trials: in the order in which they are to run; those that they begin from come before them by themselves.
        folder: made if need be.
        jobs: processes at a time.
        threads: CPU threads of each.
        stop: when asked, runs under way save and end; the next call resumes them.
        say: hears of every trial that ends.
        flag: what the user named the folder with, for messages.

    Raises:
        ConfigError: a configuration is wrong, two trials share a name, or the folder holds others of that name.
        CheckpointError: the folder is in use or cannot be written to.
    """
    trials = _with_parents(trials)
    with FolderLock(folder, elsewhere=flag):
        return _Work(trials=trials, folder=folder, threads=threads, stop=stop, say=say, flag=flag).run(jobs)


def _with_parents(trials: Sequence[Trial]) -> list[Trial]:
    """The trials, each after the one that it begins from.

    Raises:
        ConfigError: two differ and share a name, or a name is none of a folder.
    """
    found: dict[str, Trial] = {}

    def add(trial: Trial) -> None:
        if trial.after is not None:
            add(trial.after)
        if not NAME.fullmatch(trial.name):
            raise ConfigError(f"trial '{trial.name}': a name has letters, digits, dots and dashes only. Rename it.")
        if found.setdefault(trial.name, trial) != trial:
            raise ConfigError(f"two different trials are called '{trial.name}'. Rename one of them.")

    for trial in trials:
        add(trial)
    return list(found.values())


@dataclass(kw_only=True)
class _Work:
    """One call of `run_trials`."""

    trials: Sequence[Trial]
    folder: Path
    threads: int
    stop: Stop
    say: Callable[[str], None]
    flag: str
    ended: int = 0

    def run(self, jobs: int) -> Trials:
        for trial in self.trials:
            self._check(trial)
        waiting = self._unfinished()
        self.ended = len(self.trials) - len(waiting)
        if self.ended:
            self.say(f"{self.ended} of {len(self.trials)} runs are finished already")
        self._clear()
        failures, started = list[TrialFailure](), time.monotonic()

        def ended(outcome: Outcome) -> None:
            self.ended += 1
            self._clear()
            place = f"[{self.ended}/{len(self.trials)}] {outcome.name}"
            if outcome.reason is not None:
                failure = TrialFailure(name=outcome.name, reason=outcome.reason, log=self._log(outcome.name))
                failures.append(failure)
                self.say(f"{place}: FAILED: {failure.reason}; see {failure.log}")
                return
            left, spent = len(self.trials) - self.ended, time.monotonic() - started
            rest = f"; {left} left, about {clock(spent / (len(waiting) - left) * left)}" if left else ""
            self.say(f"{place}: {self._said(outcome.name)}{clock(outcome.seconds)}{rest}")

        run_jobs([self._job(t) for t in waiting], at_once=jobs, threads=self.threads, stop=self.stop, ended=ended)
        finished = [trial for trial in self.trials if self._finished(trial)]
        return Trials(
            results={trial.name: read_trial(self._place(trial.name)) for trial in finished},
            failures=tuple(failures),
            stopped=self.stop.requested,
        )

    def _unfinished(self) -> list[Trial]:
        """Those that are to be run. A finished one is among them, and begun anew, where its export is needed and gone."""
        names = {trial.name for trial in self.trials if not self._finished(trial)}
        while True:
            wanted = {t.after.name for t in self.trials if t.name in names and t.after is not None}
            more = {t.name for t in self.trials if t.name in wanted - names and not self._has_export(t)}
            if not more:
                break
            names |= more
        for name in names:
            if (self._place(name) / SUMMARY).is_file():
                self.say(f"{name} is trained again: its model is needed, and was not kept")
                wait_until_free(self._place(name))
                shutil.rmtree(self._place(name))
        return [trial for trial in self.trials if trial.name in names]

    def _said(self, name: str) -> str:
        accuracy = read_json(self._place(name) / SUMMARY)["accuracy_after"]
        return "" if accuracy is None else f"{100 * accuracy:.1f} % on held-out problems, "

    # --- places ------------------------------------------------------------------------------------------------------

    def _place(self, name: str) -> Path:
        return self.folder / RUNS / name

    def _log(self, name: str) -> Path:
        return self.folder / LOGS / f"{name}.log"

    def _file(self, trial: Trial) -> Path:
        return self.folder / CONFIGS / f"{trial.name}.toml"

    def _has_export(self, trial: Trial) -> bool:
        return (self._place(trial.name) / EXPORT).is_dir()

    def _finished(self, trial: Trial) -> bool:
        has_summary = (self._place(trial.name) / SUMMARY).is_file()
        return has_summary and (self._has_export(trial) or not trial.keep_export)

    # --- one trial ---------------------------------------------------------------------------------------------------

    def _resolved(self, trial: Trial) -> Config:
        """The configuration that is run."""
        config, parent = trial.config, trial.after
        run = replace(config.run, folder=str(self.folder / RUNS), name=trial.name, keep_checkpoints=1, keep_every=None)
        is_parent = any(t.after is not None and t.after.name == trial.name for t in self.trials)
        run = replace(run, export=trial.keep_export or is_parent)
        config = replace(config, run=run, train=replace(config.train, threads=self.threads))
        if parent is None:
            return config
        path = str((self._place(parent.name) / EXPORT).resolve())
        return replace(config, model=replace(config.model, path=path, revision=None, rope_theta=None, context=None))

    def _described(self, trial: Trial) -> str:
        """What beyond its configuration makes a trial; kept as the description of its file."""
        parent = "" if trial.after is None else f", from {trial.after.name}"
        return f"{trial.name}: {' '.join(trial.command)}{parent}"

    def _check(self, trial: Trial) -> None:
        """The configuration is right, and the folder holds no other run of this name.

        Raises:
            ConfigError: names the trial and the setting.
        """
        config = self._resolved(trial)
        try:
            check_config(config)
        except ConfigError as error:
            raise ConfigError(f"{trial.name}: {error}") from error
        if not (self._place(trial.name) / CONFIG).is_file() or not self._file(trial).is_file():
            return
        tables = read_toml(self._file(trial))
        said = tables.pop("description", "")
        found: tuple[str, Any, Any] | None = ("its command or start", said, self._described(trial))
        if said == self._described(trial):
            stored = decode(Config, tables)
            if trial.after is not None:  # the folder may have been moved
                stored = replace(stored, model=replace(stored.model, path=config.model.path))
            found = changed_setting(stored, config)
        if found is not None:
            raise ConfigError(
                f"{self._place(trial.name)} was run with {found[0]} = {found[1]!r}, not {found[2]!r}. Choose another "
                f"{self.flag}, or put the settings back as they were."
            )

    def _job(self, trial: Trial) -> Job:
        def prepare() -> list[Command]:
            place = self._place(trial.name)
            wait_until_free(place)
            file = self._file(trial)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(config_toml(self._resolved(trial), self._described(trial)), encoding="utf-8")
            return [[*trial.command, str(file), *(["--resume"] if (place / CONFIG).is_file() else [])]]

        after = None if trial.after is None else trial.after.name
        return Job(name=trial.name, log=self._log(trial.name), prepare=prepare, done=lambda: None, after=after)

    def _clear(self) -> None:
        """Remove checkpoints of finished trials, and exports that nothing needs any more."""
        needed = {t.after.name for t in self.trials if t.after is not None and not self._finished(t)}
        for trial in self.trials:
            if self._finished(trial):
                parts = ["checkpoints"] if trial.keep_export or trial.name in needed else ["checkpoints", EXPORT]
                for part in parts:
                    shutil.rmtree(self._place(trial.name) / part, ignore_errors=True)
