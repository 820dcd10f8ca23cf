"""One run at a time in a folder.

The lock is the kernel's (flock): it goes when its holder ends, however it ends, so a crash leaves nothing to clean up. The file
says who holds it and stays where it is; its presence means nothing.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
from pathlib import Path
from types import TracebackType

from mifo.errors import CheckpointError

LOCK = "run.lock"
NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
NO_FOLDER_LOCKS = NO_LOCKS | {errno.EBADF, errno.EISDIR}
NOT_WRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS}


class FolderLock:
    """Holds a run folder, making it and its parents if need be; those that it made and that are still empty go with it.

    Args:
        folder: the run folder.
        enabled: false only makes the folder, for file systems without locks.
        elsewhere: the flag by which another folder is chosen, for messages.

    Raises (on entry):
        CheckpointError: another process holds it (which one), the file system has no locks, or it cannot be written to.
    """

    def __init__(self, folder: Path, *, enabled: bool = True, elsewhere: str = "--run.folder") -> None:
        self.folder, self.enabled, self.elsewhere = folder, enabled, elsewhere
        self._file: int | None = None
        self._held: int | None = None
        self._made: list[Path] = []

    def __enter__(self) -> FolderLock:
        self._made = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self.enabled:
                self._acquire()
        except OSError as error:
            raise CheckpointError(self._refusal(error)) from error
        return self

    def _acquire(self) -> None:
        path = self.folder / LOCK
        while True:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not path.exists() or not os.path.samestat(os.fstat(file), path.stat()):
                    os.close(file)  # its last holder removed it between our open and our lock
                    self.folder.mkdir(parents=True, exist_ok=True)
                    continue
                self._hold_folder()
                os.ftruncate(file, 0)
                os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            except BaseException:
                os.close(file)
                raise
            self._file = file
            return

    def _hold_folder(self) -> None:
        """Lock the folder itself too: somebody may delete the file while its holder runs. Network file systems cannot."""
        place = os.open(self.folder, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(place)
            if error.errno not in NO_FOLDER_LOCKS:
                raise
        else:
            self._held = place

    def _refusal(self, error: OSError) -> str:
        if isinstance(error, BlockingIOError):
            name = "--run.name" if self.elsewhere == "--run.folder" else self.elsewhere
            file = self.folder / LOCK
            holder = file.read_text(encoding="utf-8", errors="replace").strip() if file.is_file() else ""
            holder = holder or "another process"
            return f"{self.folder} is in use by {holder}. Wait for it, end it, or choose another {name}."
        if error.errno in NO_LOCKS:
            return (
                f"{self.folder}: its file system cannot lock files ({error.strerror}). Put run.folder on one that can, or "
                "take care yourself that no two runs share the folder, with --run.no-lock."
            )
        if error.errno == errno.ELOOP:
            return f"{self.folder / LOCK} is a symbolic link, which is never written through. Remove it; it holds no result."
        if error.errno in NOT_WRITABLE:
            return f"{self.folder} cannot be written to ({error.strerror}). Choose another {self.elsewhere}."
        return f"{self.folder} cannot be used ({error.strerror or error}). Choose another {self.elsewhere}."

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        left = {path.name for path in self.folder.iterdir()} if self.folder.is_dir() else {"gone"}
        if self._made and left <= {LOCK}:  # the run never began: leave nothing in the way
            (self.folder / LOCK).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # somebody else has put something beside it meanwhile
                for path in self._made:
                    path.rmdir()
        for file in (self._file, self._held):
            if file is not None:
                os.close(file)
        self._file = self._held = None
