"""What a grading process gives up before it meets a model's text: new processes, sockets, signals, writing, `eval`.

Two nets, both irrevocable. A seccomp filter makes the kernel refuse the system calls below with EPERM (Linux on x86-64 and
AArch64; it needs no privileges and binds root too, which RLIMIT_NPROC does not). An audit hook makes the interpreter refuse
code compiled from text, so that a parser that comes to call `eval` raises instead. Neither is what keeps the trainer
alive: the parent's deadline and SIGKILL are.

Standard library alone, no import of the project: `sandbox` hands `filter_program` to processes that cannot import it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import os
import platform
import signal
import struct
import sys

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SECCOMP_MODE_FILTER = 2
_ALLOW, _EPERM, _ENOSYS, _KILL = 0x7FFF0000, 0x00050001, 0x00050026, 0x80000000
_LOAD, _JUMP_EQUAL, _JUMP_AT_LEAST, _JUMP_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCH, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_X32 = 0x40000000
_CLONE_THREAD = 0x00010000
_WRITING = os.O_WRONLY | os.O_RDWR | getattr(os, "O_CREAT", 0) | getattr(os, "O_TRUNC", 0)


def _numbers(table: str) -> tuple[int, ...]:
    """The numbers of a table of names and numbers."""
    return tuple(int(word) for word in table.split() if word.isdigit())


@dataclasses.dataclass(frozen=True, slots=True)
class _Machine:
    """System call numbers of one architecture (the kernel's unistd.h); clone3 is 435 and openat2 437 on both.

    `processes`: making, signalling or tracing processes, sockets, namespaces, mounts and other ways into the kernel.
    `writing`: changing files by name, memory that is a file, leaving the process group.
    """

    audit_arch: int
    clone: int
    open: int | None
    openat: int
    processes: tuple[int, ...]
    writing: tuple[int, ...]


_MACHINES = {
    "x86_64": _Machine(
        audit_arch=0xC000003E,
        clone=56,
        open=2,
        openat=257,
        processes=_numbers(
            """fork 57 vfork 58 execve 59 execveat 322 socket 41 socketpair 53 kill 62 tkill 200 tgkill 234
            rt_sigqueueinfo 129 rt_tgsigqueueinfo 297 ptrace 101 process_vm_readv 310 process_vm_writev 311
            pidfd_send_signal 424 pidfd_open 434 io_uring_setup 425 bpf 321 perf_event_open 298 userfaultfd 323
            unshare 272 setns 308 mount 165 umount2 166 pivot_root 155 chroot 161 keyctl 250 add_key 248 request_key 249"""
        ),
        writing=_numbers(
            """creat 85 rename 82 link 86 unlink 87 symlink 88 mkdir 83 rmdir 84 chmod 90 chown 92 lchown 94 truncate 76
            mknod 133 unlinkat 263 renameat 264 renameat2 316 linkat 265 symlinkat 266 mkdirat 258 fchmodat 268
            fchownat 260 mknodat 259 memfd_create 319 setsid 112 setpgid 109"""
        ),
    ),
    "aarch64": _Machine(
        audit_arch=0xC00000B7,
        clone=220,
        open=None,
        openat=56,
        processes=_numbers(
            """execve 221 execveat 281 socket 198 socketpair 199 kill 129 tkill 130 tgkill 131 rt_sigqueueinfo 138
            rt_tgsigqueueinfo 240 ptrace 117 process_vm_readv 270 process_vm_writev 271 pidfd_send_signal 424
            pidfd_open 434 io_uring_setup 425 bpf 280 perf_event_open 241 userfaultfd 282 unshare 97 setns 268 mount 40
            umount2 39 pivot_root 41 chroot 51 keyctl 219 add_key 217 request_key 218"""
        ),
        writing=_numbers(
            """unlinkat 35 renameat 38 renameat2 276 linkat 37 symlinkat 36 mkdirat 34 fchmodat 53 fchownat 54 mknodat 33
            truncate 45 memfd_create 279 setsid 157 setpgid 154"""
        ),
    ),
}


class ConfineError(Exception):
    """The kernel or the architecture knows no system call filter; the text says which."""


def filter_program(*, threads: bool, writing: bool) -> bytes:
    """A seccomp filter as an array of `struct sock_filter`.

    Args:
        threads: new threads are allowed; new processes never are.
        writing: files may be opened for writing, made and removed.

    Raises ConfineError on another system than Linux on x86-64 or AArch64.
    """
    machine = _MACHINES.get(platform.machine()) if sys.platform == "linux" else None
    if machine is None:
        raise ConfineError(f"no system call filter is known for {sys.platform} on {platform.machine()}")
    rules = [
        _instruction(_LOAD, _ARCH),
        _instruction(_JUMP_EQUAL, machine.audit_arch, yes=1),
        _instruction(_RETURN, _KILL),
        _instruction(_LOAD, _NUMBER),
        _instruction(_JUMP_AT_LEAST, _X32, no=1),
        _instruction(_RETURN, _EPERM),
    ]
    rules += _refuse(435, _ENOSYS) + _refuse(
        437, _ENOSYS
    )  # clone3, openat2: libraries fall back to what can be read here
    rules += _refuse_unless_bit(machine.clone, 0, _CLONE_THREAD) if threads else _refuse(machine.clone, _EPERM)
    for number in machine.processes:
        rules += _refuse(number, _EPERM)
    if not writing:
        for number in machine.writing:
            rules += _refuse(number, _EPERM)
        rules += _refuse_if_bit(machine.openat, 2, _WRITING)
        rules += _refuse_if_bit(machine.open, 1, _WRITING) if machine.open is not None else []
    return b"".join([*rules, _instruction(_RETURN, _ALLOW)])


def _instruction(code: int, value: int, *, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("=HBBI", code, yes, no, value)


def _refuse(number: int, answer: int) -> list[bytes]:
    return [_instruction(_JUMP_EQUAL, number, no=1), _instruction(_RETURN, answer)]


def _refuse_if_bit(number: int, argument: int, bits: int) -> list[bytes]:
    """EPERM where a flag argument has any of `bits`; the number is loaded again for the rules that follow."""
    return [
        _instruction(_JUMP_EQUAL, number, no=4),
        _instruction(_LOAD, _ARGUMENTS + 8 * argument),
        _instruction(_JUMP_ANY_BIT, bits, no=1),
        _instruction(_RETURN, _EPERM),
        _instruction(_LOAD, _NUMBER),
    ]


def _refuse_unless_bit(number: int, argument: int, bits: int) -> list[bytes]:
    return [
        _instruction(_JUMP_EQUAL, number, no=4),
        _instruction(_LOAD, _ARGUMENTS + 8 * argument),
        _instruction(_JUMP_ANY_BIT, bits, yes=1),
        _instruction(_RETURN, _EPERM),
        _instruction(_LOAD, _NUMBER),
    ]


def refuse_system_calls(program: bytes) -> None:
    """Put this process under a filter for good. Raises ConfineError when the kernel refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    rules = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(rules))
    done = libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    if not done or libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.c_char_p(header), 0, 0) != 0:
        raise ConfineError(f"the kernel takes no system call filter ({os.strerror(ctypes.get_errno())})")


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends; leaves at once if `parent` is gone already."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(0)


def refuse_code_from_text(trusted: frozenset[str]) -> list[str]:
    """From now on `eval`, `exec` and `compile` of text raise. Returns a list to which each refusal is added.

    Args:
        trusted: files that may, since they write code of their own: named tuples, monomials of a polynomial ring.
    """
    refusals: list[str] = []

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "exec":
            origin = str(getattr(arguments[0], "co_filename", ""))
        elif event == "compile":
            origin = str(arguments[1])
        else:
            return
        caller = sys._getframe(1).f_code.co_filename
        if origin.startswith("<") and not origin.startswith("<frozen ") and caller not in trusted:
            refusals.append(caller)
            raise PermissionError("a grading worker runs no code made from text")

    sys.addaudithook(hook)
    return refusals
