r"""Comparisons in processes that can be killed: the only place where a model's answer meets a mathematics library.

Each worker is forked from a fresh interpreter (`template`), not from this process and not from a re-run of the user's main
module, and spoken to over pipes that never block the parent. The deadline of a comparison is wall-clock time in the
parent: a worker past it is killed with its process group (TIMEOUT), and another is forked at once, which takes
milliseconds. A worker that dies, reports an exception or says anything but one reply to what it was asked gives ERROR;
where it died with a template that somebody killed, the comparison is made once more.
Workers and template end with the pool, with the interpreter, and with a parent that was killed: the kernel ends those that
were started in its main thread, and their input ends for all.
"""

from __future__ import annotations

import contextlib
import logging
import os
import selectors
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from mifo.errors import RewardError
from mifo.rewards.math import Comparison
from mifo.rewards.template import Template
from mifo.rewards.wire import pack, unpack
from mifo.types import Verdict

log = logging.getLogger(__name__)

_START_SECONDS = 120.0
_START_ATTEMPTS = 3


class _Worker:
    """One process and what it is doing: starting, idle, or on the comparison number `task`."""

    def __init__(self, template: Template, number: int):
        self.template, self.number = template, number
        self.requests, self.replies = template.fork(number)
        self.pid: int | None = None  # known once it is ready
        self.task: int | None = None
        self.asked = 0
        self.deadline = time.monotonic() + _START_SECONDS
        self.incoming, self.outgoing = bytearray(), b""
        os.set_blocking(self.requests, False)

    @property
    def ready(self) -> bool:
        return self.pid is not None

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

    def end(self) -> None:
        """Kills the process and all of its group, also when it is stopped; it is gone before another is forked."""
        self.template.end(self.number, self.pid)
        self.drop()

    def drop(self) -> None:
        """Closes this side of the pipes."""
        os.close(self.requests)
        os.close(self.replies)


@dataclass
class _Batch:
    """What one call of `run` was given, and how far it has come."""

    tasks: Sequence[Comparison]
    waiting: deque[int]
    verdicts: dict[int, Verdict] = field(default_factory=dict)
    repeated: set[int] = field(default_factory=set)

    def again(self, task: int) -> bool:
        """Puts a comparison back, whose worker died with the template; False when it has been put back before."""
        if task in self.repeated:
            return False
        self.repeated.add(task)
        self.waiting.appendleft(task)
        return True


class WorkerPool:
    """Up to `workers` processes and the one they are forked from, started when there is work. For one thread at a time.

    Args:
        workers: processes at most, the template not counted.
        seconds_per_answer: wall-clock deadline of one comparison, counted from when a worker takes it. A fork is the most it
            waits for, but for the first comparison without `start_ahead`, and the first after somebody killed the template: the
            libraries are loaded.
        memory_mib: address space of a worker.
    """

    def __init__(self, *, workers: int, seconds_per_answer: float, memory_mib: int):
        self._size = workers
        self._seconds = seconds_per_answer
        self._memory_mib = memory_mib
        self._template: Template | None = None
        self._workers: list[_Worker] = []
        self._started = 0
        self._failed_starts = 0
        self._told_unconfined = False
        self._owner = os.getpid()

    @property
    def process_ids(self) -> tuple[int, ...]:
        """The workers that are ready and not yet found dead."""
        return tuple(worker.pid for worker in self._workers if worker.pid is not None)

    def run(self, tasks: Sequence[Comparison]) -> list[Verdict]:
        """Verdicts in the order of the tasks. Raises RewardError when no worker can be started."""
        self._forget_inherited()
        batch = _Batch(tasks, deque(range(len(tasks))))
        try:
            while len(batch.verdicts) < len(tasks):
                self._assign(batch.waiting, tasks)
                self._wait(batch)
        finally:
            for worker in [w for w in self._workers if w.task is not None]:  # left busy by an exception
                self._remove(worker)
        return [batch.verdicts[i] for i in range(len(tasks))]

    def start_ahead(self) -> None:
        """Starts a worker before there is work, without waiting for it: the libraries load meanwhile."""
        self._forget_inherited()
        if not self._workers:
            self._start()

    def close(self) -> None:
        """Ends every worker. The pool may be used again; it then starts new ones."""
        self._forget_inherited()
        while self._workers:
            self._workers.pop().drop()
        self._close_template()

    def _close_template(self) -> None:
        if self._template is not None:
            self._template.close()
            self._template = None

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
        if self._template is not None and not self._template.alive:
            self._close_template()  # its workers died with it, and are found dead one by one
        if self._template is None:
            self._template = Template(memory_mib=self._memory_mib, seconds_per_answer=self._seconds)
        self._started += 1
        self._workers.append(_Worker(self._template, self._started))

    def _wait(self, batch: _Batch) -> None:
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
            if worker not in self._workers:  # removed with another one
                continue
            if mask & selectors.EVENT_READ:
                self._hear(worker, batch)
            else:
                worker.write()  # where nobody reads it, the end of the replies says so
        now = time.monotonic()
        for worker in [w for w in active if w in self._workers and not w.idle and w.deadline <= now]:
            self._too_late(worker, batch.verdicts)

    def _too_late(self, worker: _Worker, verdicts: dict[int, Verdict]) -> None:
        if worker.task is None:
            self._start_failed(worker, f"did not start within {_START_SECONDS:.0f} s", stuck=True)
        else:
            verdicts[worker.task] = Verdict.TIMEOUT
            self._replace(worker)

    def _hear(self, worker: _Worker, batch: _Batch) -> None:
        task = worker.task
        try:
            message = worker.read()
            verdict = None if message is None or task is None else worker.verdict(message)
        except EOFError:
            if task is None:
                self._start_failed(worker, "ended before it was ready", stuck=False)
            elif not worker.template.alive and batch.again(task):
                self._remove(worker)  # somebody killed the template, and the worker with it: no comparison is to blame
            else:
                batch.verdicts[task] = Verdict.ERROR
                self._replace(worker)
            return
        if message is None:
            return
        if task is None:
            self._greet(worker, message)
        elif verdict is not None:
            batch.verdicts[task] = verdict
            worker.task = None
            if message["leaving"]:
                self._replace(worker)

    def _greet(self, worker: _Worker, message: dict[str, object]) -> None:
        pid = message["pid"]
        assert isinstance(pid, int)
        worker.pid, self._failed_starts = pid, 0
        if message["unconfined"] is not None and not self._told_unconfined:
            self._told_unconfined = True
            log.warning("grading workers run without a filter on system calls: %s", message["unconfined"])

    def _start_failed(self, worker: _Worker, what: str, *, stuck: bool) -> None:
        self._failed_starts += 1
        words = worker.template.last_words()
        self._remove(worker)
        if stuck or worker.template.ended():
            for other in [w for w in self._workers if w.template is worker.template and not w.ready]:
                self._remove(other)  # one failure, however many were to be forked
            if worker.template is self._template:
                self._close_template()
        if self._failed_starts >= _START_ATTEMPTS:
            self._failed_starts = 0
            raise RewardError(
                f"reward.workers = {self._size}: a grading worker {what}, {_START_ATTEMPTS} times in a row ({words}); "
                f"check that math-verify is installed for {sys.executable}, and raise reward.worker_memory_mib (now "
                f"{self._memory_mib}) if memory is what it lacks"
            )

    def _replace(self, worker: _Worker) -> None:
        """Ends a worker that spoiled a comparison; another is forked while the caller goes on."""
        self._remove(worker)
        self._start()

    def _remove(self, worker: _Worker) -> None:
        self._workers.remove(worker)
        worker.end()

    def _forget_inherited(self) -> None:
        """In a forked child the workers are the parent's: neither spoken to nor killed."""
        if self._owner != os.getpid():
            for worker in self._workers:
                worker.drop()
            if self._template is not None:
                self._template.forget()
            self._template, self._workers, self._owner = None, [], os.getpid()
