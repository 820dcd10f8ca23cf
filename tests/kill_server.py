"""Runs the command line in forks of a process that has everything heavy imported; started by `kill_harness`.

Reads a JSON object a line: {"arguments": [...], "log": FILE, "slow": {REGION: SECONDS}}. Answers with a line a happening:
`pid N`, `enter REGION`, `leave REGION SECONDS`, `end STATUS` (a negative status is a signal). The child is a session of its
own, and its output goes to the log.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import time

import tyro  # noqa: F401 - the first import takes a quarter of a second

from mifo.cli import main
from mifo.rewards import Grader
from mifo.rollout import local
from mifo.train import run as run_module
from mifo.train.checkpoint import Checkpoints
from mifo.train.learner import Learner
from mifo.train.run import Run

SLOW: dict[str, float] = {}  # seconds by region, or by "region/inner function"
INSIDE: list[str] = []


def say(words: str) -> None:
    """One line to the harness, in one write, so that lines of threads do not mix."""
    os.write(CHANNEL, (words + "\n").encode())


def watched(region, owner, name):
    """Report entering and leaving a method. `region` may depend on its arguments, and be None."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def report(*arguments, **keywords):
        where = region(*arguments) if callable(region) else region
        if where is None:
            return method(*arguments, **keywords)
        say(f"enter {where}")
        start = time.monotonic()
        if where in SLOW:
            time.sleep(SLOW[where])
        INSIDE.append(where)
        result = method(*arguments, **keywords)
        INSIDE.remove(where)
        say(f"leave {where} {time.monotonic() - start:.6f}")
        return result

    setattr(owner, name, report)


def slowed(inner, owner, name):
    """Make every call of an inner function take longer in some regions, without a report."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def wait(*arguments, **keywords):
        time.sleep(max([SLOW.get(f"{region}/{inner}", 0.0) for region in INSIDE], default=0.0))
        return method(*arguments, **keywords)

    setattr(owner, name, wait)


def instrument() -> None:
    watched("generation", run_module, "collect")
    watched("grading", Grader, "grade")
    watched("evaluation", Run, "evaluate")
    watched(lambda _, phase, __: f"{phase.name} update", Run, "learn")
    watched(lambda _, phase, __: "second model" if phase.scorer_learns is not None else None, Run, "score")
    watched(lambda run, phase: None if phase.name == run.phase else "phase switch", Run, "enter")
    watched("save", Checkpoints, "save")
    slowed("decode step", local.LocalEngine, "step")
    slowed("micro-batch", Learner, "_backward")


def child(job) -> int:
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    SLOW.update(job["slow"])
    return main(job["arguments"])


def serve() -> None:
    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                status = child(job)
            except SystemExit as ended:
                status = int(ended.code or 0)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        say(f"pid {pid}")
        _, status = os.waitpid(pid, 0)
        say(f"end {os.waitstatus_to_exitcode(status)}")


CHANNEL = os.dup(1)
if __name__ == "__main__":
    instrument()
    serve()
