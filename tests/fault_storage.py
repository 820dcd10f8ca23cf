"""A file system that fails at one chosen operation, in a chosen way, and then dies or goes on."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

from mifo.train.storage import Storage

OPERATIONS = (
    "make_folder", "create", "open_log", "write", "truncate", "sync", "close", "rename", "sync_folder", "remove_tree",
)  # fmt: skip
ERRORS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "EROFS": errno.EROFS}
FAULTS = (*ERRORS, "full disk", "short write", "kill before", "kill during", "power cut")


class KilledError(BaseException):
    """The process is gone: nothing handles this, and no operation after it has an effect."""


class FaultyStorage(Storage):
    """Counts operations; number `at` (from 1) goes wrong.

    EIO, ENOSPC, EROFS: it is refused, once. full disk: a write ends half-way, and no later write has room. short write: half of
    the data is written, which is no error. kill before, kill during: the process dies before it, or half-way through it. power
    cut: the process dies before it, and what was not synced is lost: files keep a random part, names not synced come undone.
    """

    def __init__(self, fault: str | None = None, at: int = 0, seed: int = 0) -> None:
        self.fault, self.at, self.log = fault, at, []
        self.dead = self.full = False
        self.draw = random.Random(seed)
        self._open: dict[int, Path] = {}
        self._synced: dict[Path, int] = {}  # bytes of each file that are on the disk
        self._renames: list[tuple[Path, Path]] = []  # whose folder is not synced yet

    def _strikes(self, name: str, subject: object) -> bool:
        if self.dead:
            raise KilledError
        self.log.append((name, subject))
        return self.fault is not None and len(self.log) == self.at

    def _fail(self) -> None:
        if self.fault in ERRORS:
            raise OSError(ERRORS[self.fault], os.strerror(ERRORS[self.fault]))
        if self.fault == "full disk":
            self.full = True
        if self.fault == "power cut":
            self._cut_power()
        if self.fault in ("kill before", "power cut"):
            self.die()

    def die(self) -> None:
        self.dead = True
        raise KilledError

    def _cut_power(self) -> None:
        for path, synced in self._synced.items():
            if path.exists() and path.stat().st_size > synced:
                os.truncate(path, self.draw.randint(synced, path.stat().st_size))
        for source, target in reversed(self._renames):
            if target.exists() and not source.exists() and self.draw.random() < 0.5:
                target.rename(source)

    def make_folder(self, path):
        if self._strikes("make_folder", path):
            self._fail()
        super().make_folder(path)
        self._die_during()

    def create(self, path):
        if self._strikes("create", path):
            self._fail()
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        file = super().create(path)
        self._open[file], self._synced[path] = path, 0
        self._die_during()
        return file

    def open_log(self, path):
        if self._strikes("open_log", path):
            self._fail()
        file = super().open_log(path)
        self._open[file] = path
        self._synced.setdefault(path, os.fstat(file).st_size)
        self._die_during()
        return file

    def write(self, file, data):
        half = memoryview(data)[: max(1, len(data) // 2)]
        if self._strikes("write", self._open[file]):
            if self.fault in ("full disk", "short write", "kill during"):
                written = super().write(file, half)
                self.full = self.fault == "full disk"
                self._die_during()
                return written
            self._fail()
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(file, data)

    def truncate(self, file, size):
        if self._strikes("truncate", self._open[file]):
            self._fail()
        super().truncate(file, size)
        path = self._open[file]
        self._synced[path] = min(self._synced[path], size)
        self._die_during()

    def sync(self, file):
        if self._strikes("sync", self._open[file]):
            self._fail()
        super().sync(file)
        self._synced[self._open[file]] = os.fstat(file).st_size
        self._die_during()

    def close(self, file):
        if self._strikes("close", self._open.get(file)):
            self._fail()
        super().close(file)
        self._open.pop(file, None)

    def rename(self, source, target):
        if self._strikes("rename", target):
            self._fail()
        if not target.exists():
            self._renames.append((source, target))
        super().rename(source, target)
        for path in [p for p in self._synced if p == source or source in p.parents]:
            self._synced[target / path.relative_to(source)] = self._synced.pop(path)
        self._die_during()

    def sync_folder(self, path):
        if self._strikes("sync_folder", path):
            self._fail()
        super().sync_folder(path)
        self._renames = [pair for pair in self._renames if pair[1].parent != path]
        self._die_during()

    def remove_tree(self, path):
        if self._strikes("remove_tree", path):
            if self.fault == "kill during":
                for file in sorted(path.iterdir())[::2]:
                    file.unlink()
                self.die()
            self._fail()
        super().remove_tree(path)

    def _die_during(self) -> None:
        if self.fault == "kill during" and len(self.log) == self.at:
            self.die()
