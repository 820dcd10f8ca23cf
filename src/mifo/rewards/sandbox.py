"""Two confined processes for one coding answer: the program, and the checker that calls it (`inside`).

With bubblewrap each of the two gets: no network, its own process, IPC and host-name spaces, no capability, a user without
rights (also when the trainer is root), a file system that is read-only and holds the system's libraries and the
interpreter alone (no home, no data, no /etc but the linker's cache), a small /tmp, an empty environment, a seccomp filter
against new processes, limits on processor time, memory, file size and open files. Both are killed as a whole at a wall-clock
deadline. Without bubblewrap (`unsafe=True`) only the filter, the limits, the process group, the empty environment and a
temporary folder are left: such a program can read and delete whatever the user can.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mifo.errors import RewardError
from mifo.rewards.confine import ConfineError, filter_program
from mifo.types import Verdict

_SOURCE = Path(__file__).with_name("inside.py")
_TMP_BYTES = 16 << 20
_FILE_BYTES = 4 << 20
_OPEN_FILES, _THREADS = 64, 256
_USERS = range(61_184, 65_520)  # numbers that systemd sets aside for services of a moment
_ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "HOME": "/tmp",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
_CLOSED = {  # values that keep ordinary users from making user namespaces
    "user.max_user_namespaces": "0",
    "kernel.unprivileged_userns_clone": "0",
    "kernel.apparmor_restrict_unprivileged_userns": "1",
}
_REPLY_BYTES = 1 << 16
_KILL_SECONDS = 1.0
_PROBE_SECONDS = 30.0
_PROBE = {
    "program": "def f():\n import heapq\n return heapq.nlargest(1, [0, 1])[0]",
    "setup": "",
    "test": "assert f() == 1",
    "entry_point": None,
    "cases": None,
}


@dataclass(frozen=True, slots=True)
class Judgement:
    """A verdict with its reason, for messages and tests."""

    verdict: Verdict
    why: str


class Sandbox:
    """Judges programs, one at a time; several threads may use it at once.

    Args:
        seconds_per_answer: wall-clock deadline of one answer, start included. The program's processor time is bounded a
            second below it (at least one), so that an endless loop ends as a wrong answer and not as a time-out.
        memory_mib: address space of each of the two processes.
        unsafe: run without bubblewrap where it is missing or cannot start.
    """

    def __init__(self, *, seconds_per_answer: float, memory_mib: int, unsafe: bool):
        self._seconds = seconds_per_answer
        self._memory_mib = memory_mib
        self._unsafe = unsafe
        self._prefix: list[str] | None = None  # the command that confines; [] for none
        self._turn = 0

    def require(self) -> None:
        """Finds out, once, how programs can be confined here. Raises RewardError when they cannot and must be."""
        if self._prefix is not None:
            return
        reason = self._probe()
        if reason is None:
            return
        if not self._unsafe:
            raise RewardError(
                f"grader = 'code': programs written by a model run only in a sandbox, and {reason} Otherwise leave out problems "
                "with the grader 'code', or accept that such programs can read, change and delete your files: "
                "--unsafe-code-execution (reward.unsafe_code_execution = true)."
            )
        self._prefix = []

    @property
    def confined(self) -> bool:
        """Whether programs run under bubblewrap; known after `require`."""
        return bool(self._prefix)

    def _probe(self) -> str | None:
        """Why bubblewrap cannot be used and what helps; None, with the command set, when a program was judged rightly."""
        bubblewrap = shutil.which("bwrap")
        if bubblewrap is None:
            return (
                "bubblewrap (the command bwrap) is not installed. Install it (for example: apt-get install bubblewrap)."
            )
        try:
            filter_program(threads=True, writing=True)
        except ConfineError as error:
            return f"{error}."
        self._prefix = bubblewrap_command(bubblewrap)
        words: list[str] = []
        found = self._judge({**_PROBE}, _PROBE_SECONDS, words)
        if found.verdict is Verdict.CORRECT:
            return None
        self._prefix = None
        said = " ".join(words).strip().splitlines() or [found.why]
        return f"bubblewrap cannot start here ({said[-1][:300]}). {_what_helps()}"

    def judge(self, job: Mapping[str, Any]) -> Judgement:
        """The verdict on a job as `inside.checker` takes it. Raises what `require` raises."""
        self.require()
        return self._judge(job, self._seconds, [])

    def _judge(self, job: Mapping[str, Any], seconds: float, words: list[str]) -> Judgement:
        """One answer; what the checker's process wrote to its standard error is added to `words`."""
        deadline = time.monotonic() + seconds
        with contextlib.ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="mifo-code-"))
            job_file = stack.enter_context(tempfile.TemporaryFile())
            errors = stack.enter_context(tempfile.TemporaryFile())
            job_file.write(json.dumps(dict(job)).encode("ascii"))
            job_file.seek(0)
            pipes = [os.pipe() for _ in range(3)]  # checker to program, program to checker, verdict
            (asks, ask), (hears, reply), (verdict, decide) = pipes
            open_ends = {end for pipe in pipes for end in pipe}
            processes: list[subprocess.Popen[bytes]] = []
            try:
                processes.append(self._start({"role": "program", "stdin": _reads_input(job)}, folder, asks, reply))
                role = {"role": "checker", "job": job_file.fileno(), "verdict": decide}
                processes.append(
                    self._start(role, folder, hears, ask, errors=errors.fileno(), keep=(job_file.fileno(), decide))
                )
                for end in open_ends - {verdict}:
                    os.close(end)
                    open_ends.discard(end)
                return _read_verdict(verdict, deadline)
            finally:
                for process in processes:
                    _end(process)
                for end in open_ends:
                    os.close(end)
                errors.seek(0)
                words.append(errors.read(2000).decode("utf-8", "replace"))

    def _start(
        self,
        role: dict[str, Any],
        folder: str,
        given: int,
        said: int,
        *,
        errors: int = subprocess.DEVNULL,
        keep: tuple[int, ...] = (),
    ) -> subprocess.Popen[bytes]:
        assert self._prefix is not None
        root = bool(self._prefix) and os.geteuid() == 0
        self._turn += 1
        job = {
            **role,
            "user": _USERS[(os.getpid() * 97 + self._turn) % len(_USERS)] if root else None,
            "limits": self._limits(),
            "path": library_path() if self._prefix else [entry for entry in sys.path if Path(entry).is_dir()],
            "filter": self._filter(role["role"]).hex(),
        }
        command = [os.path.realpath(sys.executable), "-S", "-B", "-c", _SOURCE.read_text("utf-8"), json.dumps(job)]
        return subprocess.Popen(
            [*self._prefix, *command],
            stdin=given,
            stdout=said,
            stderr=errors,
            pass_fds=keep,
            cwd=folder,
            env=_ENVIRONMENT,
            start_new_session=True,
        )

    def _limits(self) -> dict[str, int]:
        return {
            "RLIMIT_AS": self._memory_mib << 20,
            "RLIMIT_CPU": max(1, math.ceil(self._seconds) - 1),
            "RLIMIT_FSIZE": _FILE_BYTES,
            "RLIMIT_NOFILE": _OPEN_FILES,
            "RLIMIT_NPROC": _THREADS,
            "RLIMIT_CORE": 0,
        }

    def _filter(self, role: str) -> bytes:
        """The system call filter of a role; empty where the system has none, which `require` lets pass only if unsafe."""
        try:
            return filter_program(threads=role == "program", writing=True)
        except ConfineError:
            return b""


def _what_helps() -> str:
    """How bubblewrap can be let start, for this user on this machine."""
    if os.geteuid() == 0:
        return (
            "As root it needs CAP_SYS_ADMIN, CAP_SETUID and CAP_SETGID and must be able to mount and to change to another user, "
            "which containers take away unless they are started with it; or run as an ordinary user."
        )
    closed = [f"{name} = {value}" for name, value in _CLOSED.items() if _kernel_setting(name) == value]
    why = (
        f": here {' and '.join(closed)} (sysctl)"
        if closed
        else " by the kernel and, in a container, by its seccomp profile"
    )
    return f"An ordinary user must be allowed to make user namespaces{why}. Allow that, or run as root."


def _kernel_setting(name: str) -> str | None:
    path = Path("/proc/sys", *name.split("."))
    return path.read_text("ascii").strip() if path.is_file() else None


def _reads_input(job: Mapping[str, Any]) -> bool:
    return job["cases"] is not None and job["entry_point"] is None


def bubblewrap_command(bubblewrap: str) -> list[str]:
    """bubblewrap with everything taken away that it can take away, up to the command to run."""
    command = [bubblewrap, "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--unshare-cgroup-try"]
    command += ["--die-with-parent", "--hostname", "sandbox", "--clearenv"]
    if (
        os.geteuid() == 0
    ):  # `inside` becomes another user; in a user namespace of root's it would stay root outside of it
        command += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    for name, value in _ENVIRONMENT.items():
        command += ["--setenv", name, value]
    command += ["--proc", "/proc", "--dev", "/dev"]
    for folder in ("/tmp", "/dev/shm"):  # before the libraries, which may lie below /tmp
        command += ["--perms", "1777", "--size", str(_TMP_BYTES), "--tmpfs", folder]
    return [*command, *_system(), "--remount-ro", "/dev", "--remount-ro", "/", "--chdir", "/tmp", "--"]


def _system() -> list[str]:
    """The mounts: the system's libraries, the interpreter and the installed packages, all read-only."""
    folders = [os.path.realpath(sys.base_prefix), *library_path(), "/nix/store"]
    shown = [path for path in folders if not path.startswith("/usr/") and path != "/usr" and Path(path).is_dir()]
    shown += [path for path in ("/etc/ld.so.cache", "/etc/alternatives") if Path(path).exists()]
    command = ["--ro-bind", "/usr", "/usr"]
    for name in ("/bin", "/sbin", "/lib", "/lib32", "/lib64"):
        if Path(name).is_symlink():
            command += ["--symlink", os.readlink(name), name]
        elif Path(name).is_dir():
            command += ["--ro-bind", name, name]
    parents = {parent for path in shown for parent in Path(path).parents if str(parent) not in ("/", "/tmp")}
    for parent in sorted(parents):  # made empty, and open to the user that the program runs as
        command += ["--perms", "0755", "--dir", str(parent)]
    for path in shown:
        command += ["--ro-bind", path, path]
    return command


def library_path() -> list[str]:
    """The folders of installed packages on the search path; a user's own folders stay outside."""
    found = [Path(entry) for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    return [str(entry) for entry in found if entry.is_dir()]


def _read_verdict(descriptor: int, deadline: float) -> Judgement:
    """What the checker writes, until it closes its end or the deadline passes."""
    text = b""
    while True:
        ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return Judgement(Verdict.TIMEOUT, "the deadline passed")
        data = os.read(descriptor, _REPLY_BYTES)
        text += data
        if not data or len(text) > _REPLY_BYTES:
            break
    try:
        message = json.loads(text)
        return Judgement(Verdict(message["verdict"]), str(message["why"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        return Judgement(Verdict.ERROR, "the checker ended without a verdict")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kills a process with its group; under bubblewrap the kernel kills all that its first process leaves."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # in an uninterruptible call: Popen reaps it later
        process.wait(_KILL_SECONDS)
