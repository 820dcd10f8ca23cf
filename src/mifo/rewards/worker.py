r"""A worker process: reads comparisons from its standard input, answers on its standard output, until the input ends.

Started by `pool` with the interpreter and the search path of its parent, never through the parent's main module. It
bounds itself as well, since its parent may be killed while it computes: the kernel ends it with its parent, and when an
answer takes longer than the deadline (SIGALRM with its default action needs no interpreter; the limit on processor time
holds even where a library took that signal), its memory is bounded, and it leaves when its input ends. Before the first
comparison it gives up new processes, sockets, signals, writing and `eval` (`confine`). POSIX only.
"""

from __future__ import annotations

import math
import os
import resource
import signal
import sys
from pathlib import Path

from mifo.rewards import confine
from mifo.rewards.wire import pack, unpack

_GRACE_SECONDS = 2.0  # the parent kills at the deadline; only an orphan lives this much longer
_NEARLY = 0.9  # of the address space: past it, a failed comparison is blamed on memory
_STATUS = Path("/proc/self/status")


def main(*, memory_mib: int, seconds_per_answer: float, parent: int) -> None:
    """Runs until standard input ends. Raises ImportError when math-verify is missing.

    `parent` is the process to die with; 0 for none.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to all processes of a run, they are the parent's to handle:
        signal.signal(number, signal.SIG_IGN)  # a worker that ended by one would look like a verdict of error
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    if parent:
        confine.end_with_parent(parent)
    resource.setrlimit(resource.RLIMIT_AS, (memory_mib << 20, memory_mib << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    replies = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not enter the replies

    from mifo.rewards.compare import GENERATORS

    unconfined = _confine()
    refusals = confine.refuse_code_from_text(GENERATORS)
    _send(replies, {"ready": True, "unconfined": unconfined})
    _serve(replies, refusals, memory_mib, seconds_per_answer)


def _confine() -> str | None:
    """Gives up what a comparison does not need; says why not where the system has no such filter."""
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))  # binds all users but root, on any system
    try:
        confine.refuse_system_calls(confine.filter_program(threads=False, writing=False))
    except confine.ConfineError as error:
        return str(error)
    return None


def _serve(replies: int, refusals: list[str], memory_mib: int, seconds_per_answer: float) -> None:
    buffer = bytearray()
    while True:
        message = unpack(buffer)
        while message is None:
            data = os.read(0, 65536)
            if not data:
                return
            buffer += data
            message = unpack(buffer)
        _arm(seconds_per_answer + _GRACE_SECONDS)
        verdict, usable = _judge(message, memory_mib)
        signal.setitimer(signal.ITIMER_REAL, 0)
        if verdict == "wrong" and refusals:  # the libraries take any exception for "cannot tell"
            verdict = "error"
        refusals.clear()
        leaving = not usable or _memory_ran_out(memory_mib)
        _send(replies, {"id": message["id"], "verdict": verdict, "leaving": leaving})
        if leaving:
            return  # the parent starts a fresh one when it needs it


def _arm(seconds: float) -> None:
    """Has the kernel end this process after `seconds`, of the wall clock and (where it is let) of the processor."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    used = resource.getrusage(resource.RUSAGE_SELF)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    soft = math.ceil(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _judge(message: dict[str, object], memory_mib: int) -> tuple[str, bool]:
    """The verdict, and whether this process is fit for another."""
    from mifo.rewards.compare import UnreadableGoldError, equal

    try:
        verdict = "correct" if equal(message["gold"], message["parts"]) else "wrong"
    except UnreadableGoldError:
        return "error", True
    except Exception as error:  # whatever a parser of hostile text raises is the verdict on it, not ours to handle
        return "error", not isinstance(error, MemoryError)
    if verdict == "wrong" and _memory_ran_out(memory_mib):  # sympy takes a MemoryError for "cannot tell"
        return "error", False
    return verdict, True


def _send(descriptor: int, message: dict[str, object]) -> None:
    data = pack(message)
    while data:
        data = data[os.write(descriptor, data) :]


def _memory_ran_out(memory_mib: int) -> bool:
    """Whether the process has come near its address space at any time."""
    if sys.platform == "linux":
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmPeak:"))
        peak_kib = int(line.split()[1])
    else:  # the resident peak, in bytes, is all that other systems tell
        peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return peak_kib / 1024 > _NEARLY * memory_mib
