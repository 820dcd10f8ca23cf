"""SIGINT and SIGTERM while a run trains: the first saves and ends, the second ends at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

from mifo.train.stop import Stop

SIGNALS = (signal.SIGINT, signal.SIGTERM)
EXIT_STOPPED = {0: 3, signal.SIGINT: 3, signal.SIGTERM: 4}
SHOW_CURSOR = b"\x1b[?25h"


@contextlib.contextmanager
def stopping_on_signals(stop: Stop) -> Iterator[None]:
    """Within the block the first SIGINT or SIGTERM asks the run to stop.

    It also gives both back to the system, so that a second one ends the process whatever it is doing, without a word; the last
    committed checkpoint then stands. One that came before the first was handled (both at the same instant, or two during one long
    operation) is a second one too. A signal that was ignored when the process started (nohup) stays ignored. Does nothing
    outside the main thread, where Python allows no handlers.
    """

    def handle(number: int, _: object) -> None:
        for other in handled:
            signal.signal(other, signal.SIG_DFL)
        if sys.stdout.isatty():
            os.write(sys.stdout.fileno(), SHOW_CURSOR)  # a second signal leaves no time for it
        came: list[int] = []
        # The number may not be written yet where the system gave the signal to another thread.
        with contextlib.suppress(BlockingIOError):
            came = [other for other in os.read(arrivals, 4096) if other in handled]
        if len(came) > 1:  # the interpreter took both, and would drop the other now that it has no handler
            os.kill(os.getpid(), came[1])
        name = signal.Signals(number).name
        message = f"\nmifo: {name}: saving, then ending; a second signal ends at once\n"
        with contextlib.suppress(OSError):  # nobody may be listening any more
            os.write(sys.stderr.fileno(), message.encode())  # not print: the signal may have come inside one
        stop.request(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handled = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    with _arrivals() as arrivals:
        before = {number: signal.signal(number, handle) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Within the block a SIGTERM is a KeyboardInterrupt, as Ctrl-C is, so that what was begun is cleared away.

    Does nothing outside the main thread, nor where the signal is ignored.
    """

    def handle(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) == signal.SIG_IGN:
        yield
        return
    before = signal.signal(signal.SIGTERM, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _arrivals() -> Iterator[int]:
    """A pipe into which the interpreter puts the number of every signal as it comes, before any handler runs."""
    arrivals, told = os.pipe()
    for end in (arrivals, told):
        os.set_blocking(end, False)
    before = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    try:
        yield arrivals
    finally:
        signal.set_wakeup_fd(before)
        os.close(arrivals)
        os.close(told)
