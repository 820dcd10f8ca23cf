"""Where the lab's runs are forked from: a process that has loaded the libraries, so that a run begins at once.

    owner ──"fork MODULE ARGUMENTS, log there"──▶ nursery ──fork──▶ child: its own session and log, becomes the module
          ◀──the child's number; later its end──

The nursery loads libraries and computes nothing: it has no threads and no state of a device that a fork would break. It ends
with its owner, and its children get SIGTERM with it (they save). A child that has ended stays there to be waited for until the
owner has heard of it, so that a signal never reaches a stranger. Machines with CUDA do without: `usable`.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LIBRARIES = (
    "mifo.commands", "mifo.eval.score", "mifo.lab.arena_measure", "mifo.lab.child_run", "mifo.train.build",
    "transformers.models.llama.modeling_llama", "transformers.models.qwen2.modeling_qwen2",
)  # fmt: skip
LOOK_SECONDS = 0.05
LOST = "the process that runs are forked from ends as soon as it is started"
_ATTEMPTS = 2
_PR_SET_PDEATHSIG = 1


def usable() -> bool:
    """Whether children can be forked here: on Linux, and without CUDA, which asking for devices would make unfit to fork."""
    if sys.platform != "linux":
        return False
    import torch

    return not torch.cuda.is_available()


@dataclass(kw_only=True)
class Child:
    """A run as its owner sees it; like `subprocess.Popen` as far as a pool of jobs needs it."""

    nursery: Nursery
    number: int  # process id
    status: int | None = None

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""
        self.nursery.listen(0.0)
        return self.status

    def wait(self) -> int:
        """Wait until it has ended."""
        while self.status is None:
            self.nursery.listen(None)
        return self.status

    def send_signal(self, number: int) -> None:
        """Signal it unless it has ended."""
        if self.poll() is None:
            os.kill(self.number, number)


@dataclass(kw_only=True)
class Nursery:
    """The owner's side. The process is started at the first child.

    Args:
        environment: of the process and its children.
        libraries: modules that it loads beforehand.
    """

    environment: Mapping[str, str]
    libraries: Sequence[str] = LIBRARIES
    _children: dict[int, Child] = field(default_factory=dict)
    _process: subprocess.Popen[bytes] | None = None
    _socket: socket.socket | None = None
    _heard: bytes = b""
    _answers: list[Child | str] = field(default_factory=list)

    def start(self, command: Sequence[str], log: Path) -> Child:
        """Fork a child that becomes a module.

        Args:
            command: the module and its arguments.
            log: what it prints is added there.

        Where the process was killed since the last child, another one is started.

        Raises:
            ChildProcessError: the process cannot be started, or the system has no room for a child.
        """
        for _ in range(_ATTEMPTS):
            if self._socket is None:
                self._open()
            self._say({"fork": list(command), "log": str(log)})
            while self._socket is not None and not self._answers:
                self.listen(None)
            if self._answers:
                answer = self._answers.pop()
                if isinstance(answer, str):
                    raise ChildProcessError(answer)
                return answer
        raise ChildProcessError(LOST)

    def _open(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._heard = b""
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mifo.lab.nursery", str(os.getpid()), *self.libraries],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env=self.environment,
                start_new_session=True,
            )

    def _say(self, message: Mapping[str, Any]) -> None:
        assert self._socket is not None
        try:
            self._socket.sendall(json.dumps(message).encode("utf-8") + b"\n")
        except OSError:
            self._lose()

    def listen(self, seconds: float | None) -> None:
        """Take in what the process says, waiting so long for it; None waits for something."""
        if self._socket is None:
            return
        if not select.select([self._socket], [], [], seconds)[0]:
            return
        try:
            piece = self._socket.recv(65536)
        except OSError:
            piece = b""
        if not piece:
            self._lose()
            return
        *lines, self._heard = (self._heard + piece).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "forked" in message:  # known from here on: its end may be the next line
                child = Child(nursery=self, number=message["forked"])
                self._children[child.number] = child
                self._answers.append(child)
            elif "refused" in message:
                self._answers.append(message["refused"])
            else:
                child = self._children.pop(message["ended"])
                child.status = message["status"]
                self._say({"reap": child.number})

    def _lose(self) -> None:
        """It is gone, and its children with it: the kernel asked them to end."""
        if self._socket is not None:
            self._socket.close()
        self._socket = None
        if self._process is not None:
            self._process.wait()
        self._process = None
        for child in self._children.values():
            child.status = -signal.SIGTERM
        self._children.clear()

    def close(self) -> None:
        """End the process; children that still run are asked to end."""
        if self._socket is not None:
            self._lose()


# --- the process itself ------------------------------------------------------------------------------------------------


def _end_with_parent(parent: int) -> None:
    """Ask the kernel for SIGTERM at the parent's death."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != parent:
        sys.exit(f"mifo: the process {parent} that started this one is gone")


def _serve(control: socket.socket) -> Sequence[str] | None:
    """Fork as told until the owner is gone. In a child: what it is to become; at the end: None."""
    running, heard, own = set[int](), b"", os.getpid()
    while True:
        if select.select([control], [], [], LOOK_SECONDS)[0]:
            piece = control.recv(65536)
            if not piece:
                return None
            *lines, heard = (heard + piece).split(b"\n")
            for line in lines:
                message = json.loads(line)
                if "reap" in message:
                    os.waitpid(message["reap"], 0)
                    continue
                try:
                    number = os.fork()
                except OSError as error:
                    _tell(control, {"refused": f"no process can be made: {error.strerror}"})
                    continue
                if number == 0:
                    control.close()
                    _settle(own, Path(message["log"]))
                    return list(message["fork"])
                running.add(number)
                _tell(control, {"forked": number})
        for number in list(running):
            ended = os.waitid(os.P_PID, number, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if ended is not None:
                running.remove(number)
                status = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
                _tell(control, {"ended": number, "status": status})


def _tell(control: socket.socket, message: Mapping[str, int | str]) -> None:
    control.sendall(json.dumps(message).encode("utf-8") + b"\n")


def _settle(nursery: int, log: Path) -> None:
    """A child's own session, log and end."""
    os.setsid()
    _end_with_parent(nursery)
    nothing, output = os.open(os.devnull, os.O_RDONLY), os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for source, target in ((nothing, 0), (output, 1), (output, 2)):
        os.dup2(source, target)
    os.close(nothing)
    os.close(output)


def main(arguments: Sequence[str]) -> None:
    """Load the libraries, fork as told, and in a child become the module, as `python -m` would."""
    parent, *libraries = arguments
    _end_with_parent(int(parent))
    for name in libraries:
        importlib.import_module(name)
    command = _serve(socket.socket(fileno=os.dup(0)))
    if command is not None:
        module, *rest = command
        sys.argv = [module, *rest]
        sys.modules.pop(module, None)  # loaded beforehand or not, it runs afresh as __main__
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
