"""How a run is asked to end, and where it may be broken off.

A request is always heard between turns. Inside a turn it breaks off what is under way only within a `window`: generation,
grading, evaluation, forward and backward passes. These change nothing that a checkpoint holds, so the state before them can
still be saved; the optimizer step, and everything that counts what was done, lies outside and is finished first.
"""

from __future__ import annotations

from types import TracebackType


class Stopped(BaseException):
    """What was under way is given up. No `Exception`: whatever handles errors of its work lets this pass."""


class Stop:
    """A request to stop. Signal handlers call `request`; they run in the main thread, as the windows do."""

    def __init__(self) -> None:
        self.signal: int | None = None  # who asked: a signal number, or 0 for a caller
        self._open = 0

    @property
    def requested(self) -> bool:
        """Somebody asked."""
        return self.signal is not None

    def request(self, signal: int = 0) -> None:
        """Ask the run to save and end.

        Raises:
            Stopped: a window is open.
        """
        self.signal = signal
        if self._open:
            raise Stopped

    def check(self) -> None:
        """Raises Stopped if somebody asked."""
        if self.requested:
            raise Stopped

    def close(self) -> None:
        """No window is open any more, also where a request broke off the opening or closing of one."""
        self._open = 0

    def window(self) -> Window:
        """A context in which a request breaks off the work at once; windows may nest."""
        return Window(self)


class Window:
    """See `Stop.window`."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop

    def __enter__(self) -> None:
        self._stop._open += 1
        if self._stop.requested:  # asked before the window was open, or while it opened
            self._stop._open -= 1
            raise Stopped

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop._open -= 1
