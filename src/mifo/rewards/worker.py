r"""Worker processes: each reads comparisons from its standard input and answers them, until the input ends.

`main` is the template they are forked from (`template` is its owner's side): started with the interpreter and the search path
of its parent, never through the parent's main module, it loads the libraries once and forks a worker for each request. A worker
bounds itself as well, since its parent may be killed while it computes: the kernel ends it with the template (and that with its
parent), and when an answer takes longer than the deadline (SIGALRM with its default action needs no interpreter; the limit on
processor time holds even where a library took that signal), its memory is bounded, and it leaves when its input ends. Before
the first comparison it gives up new processes, sockets, signals, writing and `eval` (`confine`). POSIX only.
"""

from __future__ import annotations

import contextlib
import gc
import math
import os
import resource
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

from mifo.rewards import confine
from mifo.rewards.template import COMMAND, END
from mifo.rewards.wire import pack, unpack

_GRACE_SECONDS = 2.0  # the parent kills at the deadline; only an orphan lives this much longer
_PATIENCE_SECONDS = 0.2  # what the kernel may take to free a killed worker's memory before the next is made
_NEARLY = 0.9  # of the address space: past it, a failed comparison is blamed on memory
_STATUS = Path("/proc/self/status")


def main(*, memory_mib: int, seconds_per_answer: float, parent: int) -> None:
    """The template, until standard input, a socket, ends. Raises ImportError when math-verify is missing.

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

    from mifo.rewards import compare  # what takes a second or more, once for all workers

    compare.warm_up()
    gc.freeze()  # what is loaded stays; a worker's collector need not copy its pages to look at it
    _fork_workers()
    _work(compare.GENERATORS, memory_mib, seconds_per_answer)


def _fork_workers() -> None:
    """Forks and kills as told over standard input, until that ends. Returns in workers alone."""
    template, children = os.getpid(), _Children()
    with socket.socket(fileno=os.dup(0)) as control:
        while True:
            message, pipes, _, _ = socket.recv_fds(control, COMMAND.size, 2)
            if not message:
                children.end_all()
                os._exit(0)  # taking the libraries down in order takes half a second
            kind, number = COMMAND.unpack(message)
            if kind == END:
                children.end(number)
            elif children.fork(number) == 0:
                break
            for pipe in pipes:
                os.close(pipe)
    os.setsid()  # a group to kill as a whole, which none of its processes can leave for another's
    confine.end_with_parent(template)
    for pipe, standard in zip(pipes, (0, 1), strict=True):
        os.dup2(pipe, standard)
        os.close(pipe)


class _Children:
    """The workers of a template by their numbers; their process ids are theirs until they are ended."""

    def __init__(self) -> None:
        self._pids: dict[int, int] = {}
        self._dying: set[int] = set()  # killed, and not yet gone after some patience

    def fork(self, number: int) -> int | None:
        """0 in the new process, its id in the template; None where the system has no room for one, which is said."""
        self._dying = {pid for pid in self._dying if not _gone(pid)}
        try:
            pid = os.fork()
        except OSError as error:
            print(f"no worker could be forked: {error}", file=sys.stderr, flush=True)
            return None
        self._pids[number] = pid
        return pid

    def end(self, number: int) -> None:
        """Kills a worker and what is in its group, and waits a moment for it to be gone."""
        pid = self._pids.pop(number, None)
        if pid is None:  # it could not be forked
            return
        _kill(pid)
        until = time.monotonic() + _PATIENCE_SECONDS
        while not (gone := _gone(pid)) and time.monotonic() < until:
            time.sleep(0.002)
        if not gone:
            self._dying.add(pid)

    def end_all(self) -> None:
        """Kills every worker and waits for all."""
        for pid in self._pids.values():
            _kill(pid)
        for pid in (*self._pids.values(), *self._dying):
            os.waitpid(pid, 0)


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)  # it may not lead a group yet
    with contextlib.suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGKILL)


def _gone(pid: int) -> bool:
    return os.waitpid(pid, os.WNOHANG)[0] == pid


def _work(generators: frozenset[str], memory_mib: int, seconds_per_answer: float) -> None:
    """A worker: tells that it is ready, then answers."""
    replies = os.dup(1)
    log = tempfile.TemporaryFile()  # noqa: SIM115 - bounded, and nobody reads it: what a library prints must not
    os.dup2(log.fileno(), 1)  # enter the replies
    unconfined = _confine()
    refusals = confine.refuse_code_from_text(generators)
    os.dup2(log.fileno(), 2)  # up to here the template's, which is read when a worker does not start
    _send(replies, {"ready": True, "pid": os.getpid(), "unconfined": unconfined})
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
            return  # the parent has a fresh one forked


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
