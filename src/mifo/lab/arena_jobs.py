"""Runs as processes of their own: some at a time, each to its end or to a stop, one failure never another's.

A job is a chain of commands with one log. Children lead process groups of their own, so that Ctrl-C in a terminal reaches this
process alone, which passes it on as SIGTERM: training saves, and the next start resumes it. Commands of this project are forked
from a process that has loaded the libraries (`nursery`) where that can be done.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mifo.errors import CheckpointError, MifoError
from mifo.lab import nursery
from mifo.lab.nursery import Child, Nursery
from mifo.train.lock import FolderLock
from mifo.train.stop import Stop

POLL_SECONDS = 0.1
SHOWN_OF_A_LINE = 400
LOCK_SECONDS = 60.0  # how long a run of a killed parent may take to save and end
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

Command = Sequence[str]  # a module of Python and its arguments


@dataclass(frozen=True, kw_only=True)
class Job:
    """`prepare` says, when the job's turn comes, which commands are run one after the other; `done` is called after them.

    Where `after` names an earlier job, this one begins once that has ended, and fails where it failed.
    """

    name: str
    log: Path
    prepare: Callable[[], Sequence[Command]]
    done: Callable[[], None]
    after: str | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a job ended; `reason` is None where it is done."""

    name: str
    seconds: float
    reason: str | None = None


@dataclass(kw_only=True)
class _Running:
    job: Job
    log_before: int
    rest: deque[Command] | None = None  # None: not prepared yet
    started: float = field(default_factory=time.monotonic)
    process: subprocess.Popen[bytes] | Child | None = None


def wait_until_free(folder: Path) -> None:
    """Give a run whose parent was killed the time to save; a folder that stays in use is for the next run itself to refuse."""
    deadline = time.monotonic() + LOCK_SECONDS
    while time.monotonic() < deadline:
        try:
            with FolderLock(folder):
                return
        except CheckpointError:
            time.sleep(0.5)


def run_jobs(
    jobs: Sequence[Job], *, at_once: int, threads: int, stop: Stop, ended: Callable[[Outcome], None]
) -> list[Outcome]:
    """Run jobs in their order, `at_once` at a time, until all have ended or `stop` is asked.

    Args:
        jobs: a failed one does not keep others from running.
        at_once: processes.
        threads: CPU threads of each.
        stop: when asked, children get SIGTERM and are waited for.
        ended: called for each job that ended by itself.

    Returns:
        The outcomes of those jobs, in the order in which they ended.
    """
    waiting, running, outcomes = list(jobs), list[_Running](), list[Outcome]()
    start = _Starter(dict(os.environ) | dict.fromkeys(THREAD_VARIABLES, str(threads)))

    def note(outcome: Outcome) -> None:
        outcomes.append(outcome)
        ended(outcome)

    try:
        while (waiting or running) and not stop.requested:
            for outcome in _begin(waiting, running, outcomes, at_once):
                note(outcome)
            for entry in list(running):
                if (ending := _advance(entry, start)) is not None:
                    running.remove(entry)
                    note(ending)
            if running:
                time.sleep(POLL_SECONDS)
    finally:
        _end([entry.process for entry in running if entry.process is not None])
        start.close()
    return outcomes


def _begin(waiting: list[Job], running: list[_Running], outcomes: Sequence[Outcome], at_once: int) -> Iterator[Outcome]:
    """Move jobs that may begin from `waiting` to `running`; the outcomes of those that cannot, as what they wait for failed."""
    failed = {outcome.name for outcome in outcomes if outcome.reason is not None}
    for job in list(waiting):
        unfinished = {entry.job.name for entry in running} | {other.name for other in waiting}
        if len(running) == at_once or job.after in unfinished:
            continue
        waiting.remove(job)
        if job.after in failed:
            failed.add(job.name)
            yield Outcome(name=job.name, seconds=0.0, reason=f"{job.after}, which it starts from, failed")
            continue
        running.append(_Running(job=job, log_before=job.log.stat().st_size if job.log.exists() else 0))


def _advance(entry: _Running, start: _Starter) -> Outcome | None:
    """Start the job's next command where none runs; its outcome once it has ended, or what it needs is refused."""
    try:
        return _go_on(entry, start)
    except (OSError, MifoError) as error:
        return Outcome(name=entry.job.name, seconds=_since(entry), reason=str(error))


def _go_on(entry: _Running, start: _Starter) -> Outcome | None:
    if entry.rest is None:
        entry.rest = deque(entry.job.prepare())
    process = entry.process
    if process is not None:
        status = process.poll()
        if status is None:
            return None
        if status != 0:
            return Outcome(name=entry.job.name, seconds=_since(entry), reason=_reason(entry, status))
    if entry.rest:
        entry.process = start(entry.rest.popleft(), entry.job.log)
        return None
    entry.job.done()
    return Outcome(name=entry.job.name, seconds=_since(entry))


def _since(entry: _Running) -> float:
    return time.monotonic() - entry.started


class _Starter:
    """Starts commands in one environment."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._nursery: Nursery | None = None

    def __call__(self, command: Command, log: Path) -> subprocess.Popen[bytes] | Child:
        log.parent.mkdir(parents=True, exist_ok=True)
        if not command[0].startswith("mifo.") or not nursery.usable():
            return self._anew(command, log)
        if self._nursery is None:
            self._nursery = Nursery(environment=self._environment)
        return self._nursery.start(command, log)

    def _anew(self, command: Command, log: Path) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-m", "mifo.lab.arena_child", str(os.getpid()), *command]
        with log.open("ab") as output:
            return subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment,
                start_new_session=True,
            )

    def close(self) -> None:
        if self._nursery is not None:
            self._nursery.close()


def _end(processes: Sequence[subprocess.Popen[bytes] | Child]) -> None:
    """SIGTERM to all, then wait: a run that saves a large checkpoint takes its time."""
    for process in processes:
        process.send_signal(signal.SIGTERM)
    for process in processes:
        process.wait()


def _reason(entry: _Running, status: int) -> str:
    """What ended a job: a signal, else its log's last message of `mifo`, or its last line."""
    if status < 0:
        return f"killed by signal {-status}"
    how = f"status {status}"
    text = entry.job.log.read_bytes()[entry.log_before :].decode("utf-8", "replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    said = next((line for line in reversed(lines) if line.startswith("mifo: ")), lines[-1] if lines else "")
    return f"{said.removeprefix('mifo: ')[:SHOWN_OF_A_LINE]} ({how})" if said else how
