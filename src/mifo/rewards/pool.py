r"""Comparisons in processes that can be killed: the only place where a model's answer meets a mathematics library.

Each worker is a fresh interpreter (`worker.main`), not a fork and not a re-run of the user's main module, spoken to
over pipes. The deadline of a comparison is wall-clock time in the parent: a worker past it is killed (TIMEOUT) and
replaced. A worker that dies or reports an exception gives ERROR. Workers end with the pool, with the interpreter, and
with a parent that was killed, since their input ends.
"""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence

from mifo.errors import RewardError
from mifo.rewards.math import Comparison
from mifo.rewards.wire import pack, unpack
from mifo.types import Verdict

_START_SECONDS = 120.0
_START_ATTEMPTS = 3
# -c rather than -m: the current directory is not searched, and the parent's search path is what the worker gets.
_BOOT = (
    "import sys; memory, seconds, *sys.path = sys.argv[1:]; from mifo.rewards.worker import main; "
    "main(memory_mib=int(memory), seconds_per_answer=float(seconds))"
)


class _Worker:
    """One process and what it is doing: starting, idle, or on the comparison number `task`."""

    def __init__(self, *, memory_mib: int, seconds_per_answer: float):
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self.process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, str(memory_mib), str(seconds_per_answer), *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            bufsize=0,
            env={**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},  # same answer, same steps, same verdict
        )
        self.ready = False
        self.task: int | None = None
        self.deadline = time.monotonic() + _START_SECONDS
        self.buffer = bytearray()

    @property
    def replies(self) -> int:
        assert self.process.stdout is not None
        return self.process.stdout.fileno()

    @property
    def idle(self) -> bool:
        return self.ready and self.task is None

    def give(self, task: int, message: bytes, seconds: float) -> bool:
        """Starts a comparison; False when the process has died since the last one."""
        assert self.process.stdin is not None
        if self.process.poll() is not None:
            return False
        try:
            self.process.stdin.write(message)
        except BrokenPipeError:
            return False
        self.task, self.deadline = task, time.monotonic() + seconds
        return True

    def read(self) -> dict[str, object] | None:
        """A whole message, or None for more to come. Raises EOFError when the process has ended or talks nonsense."""
        data = os.read(self.replies, 65536)
        if not data:
            raise EOFError
        self.buffer += data
        try:
            return unpack(self.buffer)
        except ValueError as error:
            raise EOFError from error

    def last_words(self) -> str:
        self.log.seek(max(0, self.log.seek(0, os.SEEK_END) - 2000))
        return self.log.read().decode("utf-8", "replace").strip() or "no message"

    def end(self) -> None:
        """Kills the process and waits for it."""
        self.process.kill()
        self.process.wait()
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
        self._owner = os.getpid()

    @property
    def process_ids(self) -> tuple[int, ...]:
        """The workers alive or not yet found dead."""
        return tuple(worker.process.pid for worker in self._workers)

    def run(self, tasks: Sequence[Comparison]) -> list[Verdict]:
        """Verdicts in the order of the tasks. Raises RewardError when no worker can be started."""
        self._forget_inherited()
        messages = [pack({"gold": task.gold, "parts": task.parts}) for task in tasks]
        verdicts: dict[int, Verdict] = {}
        waiting = deque(range(len(tasks)))
        try:
            while len(verdicts) < len(tasks):
                self._assign(waiting, messages)
                self._wait(verdicts)
        finally:
            for worker in [w for w in self._workers if w.task is not None]:  # left busy by an exception
                self._remove(worker)
        return [verdicts[i] for i in range(len(tasks))]

    def close(self) -> None:
        """Ends every worker. The pool may be used again; it then starts new ones."""
        self._forget_inherited()
        while self._workers:
            self._remove(self._workers[0])

    def _assign(self, waiting: deque[int], messages: list[bytes]) -> None:
        for worker in [w for w in self._workers if w.idle]:
            if waiting and not worker.give(waiting[0], messages[waiting[0]], self._seconds):
                self._remove(worker)  # it died between two comparisons: no comparison is to blame
            elif worker.task is not None:
                waiting.popleft()
        starting = sum(not w.ready for w in self._workers)
        for _ in range(min(self._size - len(self._workers), len(waiting) - starting)):
            self._workers.append(_Worker(memory_mib=self._memory_mib, seconds_per_answer=self._seconds))

    def _wait(self, verdicts: dict[int, Verdict]) -> None:
        """Until a worker says something or a deadline passes."""
        active = [w for w in self._workers if not w.idle]
        with selectors.DefaultSelector() as selector:
            for worker in active:
                selector.register(worker.replies, selectors.EVENT_READ, worker)
            timeout = max(0.0, min(w.deadline for w in active) - time.monotonic())
            heard = [key.data for key, _ in selector.select(timeout)]
        for worker in heard:
            self._hear(worker, verdicts)
        now = time.monotonic()
        for worker in [w for w in active if w not in heard and w.deadline <= now]:
            if worker.task is None:
                self._start_failed(worker, f"did not start within {_START_SECONDS:.0f} s")
            else:
                verdicts[worker.task] = Verdict.TIMEOUT
                self._remove(worker)

    def _hear(self, worker: _Worker, verdicts: dict[int, Verdict]) -> None:
        try:
            message = worker.read()
        except EOFError:
            if worker.task is None:
                self._start_failed(worker, "ended before it was ready")
            else:
                verdicts[worker.task] = Verdict.ERROR
                self._remove(worker)
            return
        if message is None:
            return
        if worker.task is None:
            worker.ready, self._failed_starts = True, 0
        else:
            verdicts[worker.task] = Verdict(message["verdict"])
            worker.task = None
            if message["leaving"]:
                self._remove(worker)

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

    def _remove(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.end()

    def _forget_inherited(self) -> None:
        """In a forked child the workers are the parent's: neither spoken to nor killed."""
        if self._owner != os.getpid():
            for worker in self._workers:
                worker.process.returncode = 0  # keeps Popen from waiting for a process that is not ours
                worker.drop()
            self._workers, self._owner = [], os.getpid()
