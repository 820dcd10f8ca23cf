r"""The process that grading workers are forked from: it has loaded the libraries, so a fresh worker is ready in milliseconds.

A comparison that must wait for a worker (the last one was killed) would otherwise wait a second or two for an interpreter
to load its libraries. The template meets no model's text: it only forks and kills, as it is told over a socket, and it
ends with whoever holds the other end. A number names a worker; process ids are given back (waited for) only when the
owner says that the worker is to end, so that a signal never reaches a stranger. The other side is `worker.main`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading

COMMAND = struct.Struct(">cI")  # what to do, and the worker's number
FORK, END = b"f", b"e"
_PATIENCE_SECONDS, _MOMENT_SECONDS = 5.0, 0.2
# -c rather than -m: the current directory is not searched, and the parent's search path is what the worker gets.
BOOT = (
    "import sys; memory, seconds, parent, *sys.path = sys.argv[1:]; from mifo.rewards.worker import main; "
    "main(memory_mib=int(memory), seconds_per_answer=float(seconds), parent=int(parent))"
)
_KEPT_ENVIRONMENT = ("LANG", "LC_ALL", "LC_CTYPE", "LD_LIBRARY_PATH", "PYTHONHOME", "TMPDIR")


class Template:
    """The owner's side of the process; started at once.

    Args:
        memory_mib: address space of each worker.
        seconds_per_answer: deadline of one comparison.
    """

    def __init__(self, *, memory_mib: int, seconds_per_answer: float):
        # The kernel's signal comes when the thread that started a process ends; only the main thread is sure to last.
        parent = os.getpid() if threading.current_thread() is threading.main_thread() else 0
        kept = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}  # no token, no secret
        self._said, self._log = "", tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._control, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-c", BOOT, str(memory_mib), str(seconds_per_answer), str(parent), *sys.path],
                stdin=theirs.fileno(),
                stdout=self._log,
                stderr=self._log,
                env={**kept, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},  # same answer, same steps, same verdict
                start_new_session=True,  # a process group to kill as a whole; and Ctrl-C is not for it
            )

    @property
    def alive(self) -> bool:
        """Whether it has not been found dead."""
        return self.process.poll() is None

    def ended(self) -> bool:
        """Whether it has ended, asked when its pipes have: the system closes them a moment before."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(_MOMENT_SECONDS)
        return not self.alive

    def fork(self, number: int) -> tuple[int, int]:
        """Asks for a worker: descriptors to write its requests to and to read its replies from.

        The replies end at once where the template is dead.
        """
        requests_out, requests = os.pipe()
        replies, replies_in = os.pipe()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            socket.send_fds(self._control, [COMMAND.pack(FORK, number)], [requests_out, replies_in])
        os.close(requests_out)
        os.close(replies_in)
        return requests, replies

    def end(self, number: int, process_id: int | None) -> None:
        """Kills a worker with its group, also when it is stopped; does not wait for it.

        Args:
            number: as given to `fork`.
            process_id: where it is known, the signal does not wait for the template to come round to it.
        """
        if process_id is not None and self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process_id, signal.SIGKILL)
        with contextlib.suppress(OSError):  # dead, or closed: its workers are gone with it
            self._control.sendall(COMMAND.pack(END, number))

    def last_words(self) -> str:
        """The end of what it and its workers, before they were ready, had to say."""
        if self._log.closed:
            return self._said
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 2000))
        return self._log.read().decode("utf-8", "replace").strip() or "no message"

    def close(self) -> None:
        """Ends it and every worker, and waits for that."""
        self._said = self.last_words()
        self._control.close()  # it kills its workers, waits for them, and leaves
        try:
            self.process.wait(_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self._log.close()

    def forget(self) -> None:
        """In a forked child of the owner: neither spoken to nor killed."""
        self.process.returncode = 0  # keeps Popen from waiting for a process that is not ours
        self._control.close()
        self._log.close()
