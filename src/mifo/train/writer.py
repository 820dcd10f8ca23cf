"""Writes checkpoints beside training: the copy is taken at once, the disk is waited for elsewhere.

At most one write is in flight; a save that comes earlier waits for it. What goes wrong in the writer is raised in the training
thread, at the next `poll`, `save` or `wait`. The copy costs as much memory as the checkpoint has bytes, for as long as the write
takes; in the foreground there is no copy.
"""

from __future__ import annotations

import threading

from mifo.errors import CheckpointError
from mifo.train.checkpoint import Checkpoints, Snapshot


class CheckpointWriter:
    """Saves for one training thread.

    Args:
        checkpoints: where to.
        background: write in a thread; otherwise `save` returns when the checkpoint is committed.
    """

    def __init__(self, checkpoints: Checkpoints, *, background: bool) -> None:
        self.checkpoints, self.background = checkpoints, background
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._committed: list[int] = []

    def save(self, step: int, snapshot: Snapshot) -> None:
        """Save a checkpoint of the tensors as they are now.

        Raises:
            CheckpointError: this save (in the foreground) or the one before it (in the background) failed, or no thread can
                be had.
        """
        self.wait()
        if not self.background:
            self.checkpoints.save(step, snapshot)
            self._committed.append(step)
            return
        thread = threading.Thread(target=self._write, args=(step, snapshot.copied()), name="checkpoint")
        try:
            thread.start()
        except RuntimeError as error:
            raise CheckpointError(
                f"no thread could be started to write a checkpoint ({error}). Free processes or raise their limit, or set "
                "run.background_checkpoints = false."
            ) from error
        self._thread = thread

    def _write(self, step: int, snapshot: Snapshot) -> None:
        try:
            self.checkpoints.save(step, snapshot)
            self._committed.append(step)
        except Exception as error:  # raised again where the run can end by it
            self._error = error

    def wait(self) -> None:
        """Until nothing is in flight; raises what the write raised."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self._raise()

    def poll(self) -> list[int]:
        """The steps committed since the last call; raises what a finished write raised."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()
        self._raise()
        done, self._committed = self._committed, []
        return done

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error
