"""Starts a Python module that is asked to end (SIGTERM: it saves) when the process that wanted it is gone, however it went.

python -m mifo.lab.arena_child PARENT_ID MODULE ARGUMENT...
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # kept across execve


def main() -> None:
    """Ask the kernel for the signal, then become the module."""
    parent, *command = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
    if os.getppid() != int(parent):
        sys.exit(f"mifo: the process {parent} that started this one is gone")
    os.execv(sys.executable, [sys.executable, "-m", *command])


if __name__ == "__main__":
    main()
