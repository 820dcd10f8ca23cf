r"""Comparisons in processes that can be killed: the only place where a model's answer meets a mathematics library.

Each worker is a fresh interpreter (`worker.main`), not a fork and not a re-run of the user's main module, spoken to
over pipes that never block the parent. The deadline of a comparison is wall-clock time in the parent: a worker past it is
killed with its process group (TIMEOUT), and another is started at once, so that the next comparison need not wait for
it. A worker that dies, reports an exception or says anything but one reply to what it was asked gives ERROR. Workers end
with the pool, with the interpreter, and with a parent that was killed: the kernel ends those that were started in its
main thread, and their input ends for all.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Sequence

from mifo.errors import RewardError
from mifo.rewards.math import Comparison
from mifo.rewards.wire import pack, unpack
from mifo.types import Verdict

log = logging.getLogger(__name__)

_START_SECONDS = 120.0
_START_ATTEMPTS = 3
# What the kernel may take to free the memory of a killed process before the parent goes on (Popen reaps it later).
_PATIENCE_SECONDS, _LAST_PATIENCE_SECONDS = 0.2, 5.0
# -c rather than -m: the current directory is not searched, and the parent's search path is what the worker gets.
_BOOT = (
    "import sys; memory, seconds, parent, *sys.path = sys.argv[1:]; from mifo.rewards.worker import main; "
    "main(memory_mib=int(memory), seconds_per_answer=float(seconds), parent=int(parent))"
)
_KEPT_ENVIRONMENT = ("LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "PYTHONHOME", "TMPDIR")


class _Worker:
    """One process and what it is doing: starting, idle, or on the comparison number `task`."""

    def __init__(self, *, memory_mib: int, seconds_per_answer: float):
        # The kernel's signal comes when the thread that started a process ends; only the main thread is sure to last.
        parent = os.getpid() if threading.current_thread() is threading.main_thread() else 0
        kept = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}  # no token, no secret
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self.process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, str(memory_mib), str(seconds_per_answer), str(parent), *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            bufsize=0,
            env={**kept, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},  # same answer, same steps, same verdict
            start_new_session=True,  # a process group to kill as a whole; and Ctrl-C is not for it
        )
        self.ready = False
        self.task: int | None = None
        self.asked = 0
        self.deadline = time.monotonic() + _START_SECONDS
        self.incoming, self.outgoing = bytearray(), b""
        os.set_blocking(self.requests, False)

    @property
    def requests(self) -> int:
        assert self.process.stdin is not None
        return self.process.stdin.fileno()

    @property
    def replies(self) -> int:
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    @property
    def idle(self) -> bool:
        return self.ready and self.task is None

    def give(self, task: int, comparison: Comparison, seconds: float) -> bool:
        """Starts a comparison; False when the process has died since the last one."""
        self.asked += 1
        self.outgoing = pack({"id": self.asked, "gold": comparison.gold, "parts": comparison.parts})
        if not self.write():
            return False
        self.task, self.deadline = task, time.monotonic() + seconds
        return True

    def write(self) -> bool:
        """Sends what the pipe takes at once; False when nobody will read it."""
        with contextlib.suppress(BlockingIOError):
            try:
                self.outgoing = self.outgoing[os.write(self.requests, self.outgoing) :]
            except BrokenPipeError:
                return False
        return True

    def read(self) -> dict[str, object] | None:
        """A whole message, or None for more to come. Raises EOFError when the process has ended or talks nonsense."""
        data = os.read(self.replies, 65536)
        if not data:
            raise EOFError
        self.incoming += data
        try:
            message = unpack(self.incoming)
        except ValueError as error:
            raise EOFError from error
        if message is not None and self.incoming:  # more than one reply: the rest would pass for the next one
            raise EOFError
        return message

    def verdict(self, message: dict[str, object]) -> Verdict:
        """The verdict in a reply. Raises EOFError where it is no reply to what was asked last."""
        if message.get("id") != self.asked or not isinstance(message.get("leaving"), bool):
            raise EOFError
        try:
            return Verdict(message.get("verdict"))
        except ValueError as error:
            raise EOFError from error

    def last_words(self) -> str:
        self.log.seek(max(0, self.log.seek(0, os.SEEK_END) - 2000))
        return self.log.read().decode("utf-8", "replace").strip() or "no message"

    def end(self, patience: float) -> None:
        """Kills the process and all of its group, also when it is stopped, and waits for it so many seconds."""
        if self.process.returncode is None:  # not yet waited for, so the number of the group is still its own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(patience)
        self.drop()

    def drop(self) -> None:
        """Closes this side of the pipes."""
        for stream in (self.process.stdin, self.process.stdout, self.log):
            assert stream is not None
            stream.close()


class WorkerPool:
    """Up to `workers` processes, started when there is work. Not for use by two threads at once.

    Args:
        workers: processes at most.
        seconds_per_answer: wall-clock deadline of one comparison, not counting a worker's start.
        memory_mib: address space of a worker.
    """

    def __init__(self, *, workers: int, seconds_per_answer: float, memory_mib: int):
        self._size = workers
        self._seconds = seconds_per_answer
        self._memory_mib = memory_mib
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        self._told_unconfined = False
        self._owner = os.getpid()

    @property
    def process_ids(self) -> tuple[int, ...]:
        """The workers alive or not yet found dead."""
        return tuple(worker.process.pid for worker in self._workers)

    def run(self, tasks: Sequence[Comparison]) -> list[Verdict]:
        """Verdicts in the order of the tasks. Raises RewardError when no worker can be started."""
        self._forget_inherited()
        verdicts: dict[int, Verdict] = {}
        waiting = deque(range(len(tasks)))
        try:
            while len(verdicts) < len(tasks):
                self._assign(waiting, tasks)
                self._wait(verdicts)
        finally:
            for worker in [w for w in self._workers if w.task is not None]:  # left busy by an exception
                self._remove(worker)
        return [verdicts[i] for i in range(len(tasks))]

    def close(self) -> None:
        """Ends every worker. The pool may be used again; it then starts new ones."""
        self._forget_inherited()
        while self._workers:
            self._workers.pop().end(_LAST_PATIENCE_SECONDS)

    def _assign(self, waiting: deque[int], tasks: Sequence[Comparison]) -> None:
        for worker in [w for w in self._workers if w.idle]:
            if waiting and not worker.give(waiting[0], tasks[waiting[0]], self._seconds):
                self._remove(worker)  # it died between two comparisons: no comparison is to blame
            elif worker.task is not None:
                waiting.popleft()
        starting = sum(not w.ready for w in self._workers)
        for _ in range(min(self._size - len(self._workers), len(waiting) - starting)):
            self._start()

    def _start(self) -> None:
        self._workers.append(_Worker(memory_mib=self._memory_mib, seconds_per_answer=self._seconds))

    def _wait(self, verdicts: dict[int, Verdict]) -> None:
        """Until a worker says something, takes something, or a deadline passes."""
        active = [w for w in self._workers if not w.idle]
        with selectors.DefaultSelector() as selector:
            for worker in active:
                selector.register(worker.replies, selectors.EVENT_READ, worker)
                if worker.outgoing:
                    selector.register(worker.requests, selectors.EVENT_WRITE, worker)
            timeout = max(0.0, min(w.deadline for w in active) - time.monotonic())
            events = [(key.data, mask) for key, mask in selector.select(timeout)]
        for worker, mask in events:
            if mask & selectors.EVENT_READ:
                self._hear(worker, verdicts)
            elif worker in self._workers:
                worker.write()  # where nobody reads it, the end of the replies says so
        now = time.monotonic()
        for worker in [w for w in active if w in self._workers and not w.idle and w.deadline <= now]:
            self._too_late(worker, verdicts)

    def _too_late(self, worker: _Worker, verdicts: dict[int, Verdict]) -> None:
        if worker.task is None:
            self._start_failed(worker, f"did not start within {_START_SECONDS:.0f} s")
        else:
            verdicts[worker.task] = Verdict.TIMEOUT
            self._replace(worker)

    def _hear(self, worker: _Worker, verdicts: dict[int, Verdict]) -> None:
        task = worker.task
        try:
            message = worker.read()
            verdict = None if message is None or task is None else worker.verdict(message)
        except EOFError:
            if task is None:
                self._start_failed(worker, "ended before it was ready")
            else:
                verdicts[task] = Verdict.ERROR
                self._replace(worker)
            return
        if message is None:
            return
        if task is None:
            self._greet(worker, message)
        elif verdict is not None:
            verdicts[task] = verdict
            worker.task = None
            if message["leaving"]:
                self._replace(worker)

    def _greet(self, worker: _Worker, message: dict[str, object]) -> None:
        worker.ready, self._failed_starts = True, 0
        if message["unconfined"] is not None and not self._told_unconfined:
            self._told_unconfined = True
            log.warning("grading workers run without a filter on system calls: %s", message["unconfined"])

    def _start_failed(self, worker: _Worker, what: str) -> None:
        self._failed_starts += 1
        words = worker.last_words()
        self._remove(worker)
        if self._failed_starts >= _START_ATTEMPTS:
            self._failed_starts = 0
            raise RewardError(
                f"reward.workers = {self._size}: a grading worker {what}, {_START_ATTEMPTS} times in a row ({words}); "
                f"check that math-verify is installed for {sys.executable}, and raise reward.worker_memory_mib (now "
                f"{self._memory_mib}) if memory is what it lacks"
            )

    def _replace(self, worker: _Worker) -> None:
        """Ends a worker that spoiled a comparison; another loads its libraries while the caller goes on."""
        self._remove(worker)
        self._start()

    def _remove(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.end(_PATIENCE_SECONDS)

    def _forget_inherited(self) -> None:
        """In a forked child the workers are the parent's: neither spoken to nor killed."""
        if self._owner != os.getpid():
            for worker in self._workers:
                worker.process.returncode = 0  # keeps Popen from waiting for a process that is not ours
                worker.drop()
            self._workers, self._owner = [], os.getpid()
