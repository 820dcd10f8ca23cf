r"""A worker process: reads comparisons from its standard input, answers on its standard output, until the input ends.

Started by `pool` with the interpreter and the search path of its parent, never through the parent's main module. It
bounds itself as well, since its parent may be killed while it computes: the kernel ends it when an answer takes longer
than the deadline (SIGALRM with its default action needs no interpreter), its memory is bounded, and it leaves when its
input ends. POSIX only.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path

from mifo.rewards.wire import pack, unpack

_GRACE_SECONDS = 2.0  # the parent kills at the deadline; only an orphan lives this much longer
_NEARLY = 0.9  # of the address space: past it, a failed comparison is blamed on memory
_STATUS = Path("/proc/self/status")


def main(*, memory_mib: int, seconds_per_answer: float) -> None:
    """Runs until standard input ends. Raises ImportError when math-verify is missing."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to all processes of a run, they are the parent's to handle:
        signal.signal(number, signal.SIG_IGN)  # a worker that ended by one would look like a verdict of error
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (memory_mib << 20, memory_mib << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    replies = os.dup(1)
    os.dup2(2, 1)  # what a library prints must not enter the replies

    from mifo.rewards.compare import UnreadableGoldError, equal

    _send(replies, {"ready": True})
    buffer = bytearray()
    while True:
        message = unpack(buffer)
        while message is None:
            data = os.read(0, 65536)
            if not data:
                return
            buffer += data
            message = unpack(buffer)
        signal.setitimer(signal.ITIMER_REAL, seconds_per_answer + _GRACE_SECONDS)
        usable = True
        try:
            verdict = "correct" if equal(message["gold"], message["parts"]) else "wrong"
            if verdict == "wrong" and _memory_ran_out(memory_mib):  # sympy takes a MemoryError for "cannot tell"
                verdict, usable = "error", False
        except UnreadableGoldError:
            verdict = "error"
        except Exception as error:  # whatever a parser of hostile text raises is the verdict on it, not ours to handle
            verdict, usable = "error", not isinstance(error, MemoryError)
        signal.setitimer(signal.ITIMER_REAL, 0)
        leaving = not usable or _memory_ran_out(memory_mib)
        _send(replies, {"verdict": verdict, "leaving": leaving})
        if leaving:
            return  # the parent starts a fresh one when it needs it


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
