"""A training run in a process of the lab: as `mifo train CONFIG.toml [--resume]`, with a part of it swapped in from Python."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mifo.config.load import load_config
from mifo.config.schema import Config
from mifo.errors import MifoError
from mifo.eval.score import make_evaluate
from mifo.rewards import Grader
from mifo.signals import EXIT_STOPPED, stopping_on_signals
from mifo.train.build import LearnerFactory, Prepared, build_run, make_grader, prepare
from mifo.train.learner import Learner
from mifo.train.lock import FolderLock
from mifo.train.loop import train
from mifo.train.run import Run
from mifo.train.summary import write_results


def _as_it_is(prepared: Prepared) -> Prepared:
    return prepared


def _nothing(run: Run) -> None:
    """Neither before nor after training."""


def _nothing_graded(run: Run, grader: Grader) -> None:
    """Measures nothing."""


@dataclass(frozen=True, kw_only=True)
class Swaps:
    """What is other than in `mifo train`.

    Attributes:
        prepared: changes what is known before the model is loaded, such as the method.
        learner_type: makes the learner.
        begin: changes a run before its first update; later its state has what this did.
        measure: called when training is over, before the summary is written.
    """

    prepared: Callable[[Prepared], Prepared] = _as_it_is
    learner_type: LearnerFactory = Learner
    begin: Callable[[Run], None] = _nothing
    measure: Callable[[Run, Grader], None] = _nothing_graded


def train_child(file: Path, *, resume: bool, make_swaps: Callable[[Config], Swaps]) -> int:
    """Train as the file says, with what is swapped in; returns the exit status, having said why it is not 0."""
    try:
        _, config = load_config(str(file))
        return _train(config, resume=resume, swaps=make_swaps(config))
    except MifoError as error:
        print(f"mifo: {error}", file=sys.stderr)
        return 2


def _train(config: Config, *, resume: bool, swaps: Swaps) -> int:
    folder = Path(config.run.folder) / (config.run.name or "run")
    with FolderLock(folder, enabled=config.run.lock), make_grader(config) as grader:
        run = build_run(
            swaps.prepared(prepare(config, grader)),
            grader,
            folder,
            make_evaluate=make_evaluate,
            listener=lambda kind, record: None,
            resume=resume,
            learner_type=swaps.learner_type,
        )
        if run.version == 0:  # no update was taken: what `begin` does again it does alike
            swaps.begin(run)
        with stopping_on_signals(run.stop):
            train(run)
        if run.stop.signal is not None:
            return EXIT_STOPPED[run.stop.signal]
        swaps.measure(run, grader)
        write_results(run)
    return 0


def child_parser(module: str) -> argparse.ArgumentParser:
    """A parser with the two arguments that every trial's command gets."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}")
    parser.add_argument("file", type=Path)
    parser.add_argument("--resume", action="store_true")
    return parser
