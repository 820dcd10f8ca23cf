"""The file system as checkpoints and logs use it: one small object, so that tests can make any single operation fail.

Nothing here decides anything. What is durable when is decided by who calls: a file is on the disk after `sync`, its name after
`sync_folder` of the folder that holds it.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

Bytes = bytes | memoryview


class Storage:
    """Each method is one operation of the system; all raise OSError."""

    def make_folder(self, path: Path) -> None:
        """Make one folder; its parent exists, it does not."""
        path.mkdir()

    def create(self, path: Path) -> int:
        """A new file, open for writing; it must not exist."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def open_log(self, path: Path) -> int:
        """A file that is read and appended to; made if missing. A link is not followed (ELOOP)."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)

    def open_to_read(self, path: Path) -> BinaryIO:
        """A file that is there, to read."""
        return path.open("rb")

    def names(self, folder: Path) -> list[str]:
        """What a folder holds."""
        return os.listdir(folder)

    def write(self, file: int, data: Bytes) -> int:
        """Write some of `data`, at least a byte; how many bytes were written."""
        return os.write(file, data)

    def truncate(self, file: int, size: int) -> None:
        """Cut a file to `size` bytes."""
        os.ftruncate(file, size)

    def sync(self, file: int) -> None:
        """Wait until the content of a file is on the disk."""
        os.fsync(file)

    def close(self, file: int) -> None:
        """Close a file."""
        os.close(file)

    def rename(self, source: Path, target: Path) -> None:
        """Rename in one step; a file at `target` is replaced."""
        os.rename(source, target)

    def sync_folder(self, path: Path) -> None:
        """Wait until the names in a folder are on the disk."""
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        except OSError as error:
            if error.errno != errno.EINVAL:  # some network file systems have nothing to wait for and say so this way
                raise
        finally:
            os.close(folder)

    def remove_tree(self, path: Path) -> None:
        """Remove a folder and what it holds."""
        shutil.rmtree(path)


def write_all(storage: Storage, file: int, data: Bytes) -> None:
    """Write all of `data`, in as many writes as it takes."""
    rest = memoryview(data)
    while rest:
        rest = rest[storage.write(file, rest) :]


def write_file(storage: Storage, path: Path, chunks: Iterable[Bytes]) -> None:
    """A new file whose content is on the disk when this returns; its name is not yet."""
    file = storage.create(path)
    try:
        for chunk in chunks:
            write_all(storage, file, chunk)
        storage.sync(file)
    finally:
        storage.close(file)


def sync_files(folder: Path) -> None:
    """Wait until all files below a folder, which somebody else wrote, are on the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                os.fsync(file)
            finally:
                os.close(file)


def replace_file(storage: Storage, path: Path, data: bytes) -> None:
    """Put `data` in the place of a file in one step: whoever reads sees the old content or the new, also after a crash."""
    staging = path.with_name(f".{path.name}.writing")
    staging.unlink(missing_ok=True)
    write_file(storage, staging, [data])
    storage.rename(staging, path)
    storage.sync_folder(path.parent)
