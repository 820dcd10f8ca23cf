"""The append-only JSONL files of a run folder: metrics, samples, events, evaluations.

A checkpoint stores their lengths; a resumed run cuts them back to it, so that what a killed run wrote after its last
checkpoint is not there twice, and half a line never stays.

The files are held open. One that is deleted, or replaced by another, while the run goes on is put back whole at the next line.
Lines that are gone when a run is resumed cannot be made again: the run goes on and says how many bytes are missing.
Nothing is written through a symbolic link: one that takes a log's place under way is replaced, one that was there is refused.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mifo.errors import CheckpointError
from mifo.printable import printable_json
from mifo.train.storage import Storage, write_all, write_file

BLOCK = 1 << 22
"""Bytes that are read at once; Linux gives 2 GiB at most."""
STREAMS = ("metrics", "samples", "events", "evaluations")


class Journal:
    """Four JSONL files, one object a line, handed to the system at every line."""

    def __init__(self, folder: Path, storage: Storage) -> None:
        self.paths = {name: folder / f"{name}.jsonl" for name in STREAMS}
        self.storage = storage
        self._files: dict[str, int] = {}
        self._sizes: dict[str, int] = {}  # of the files that are open, as this process left them
        self._lost: dict[str, int] = {}

    def write(self, stream: str, record: Mapping[str, Any]) -> None:
        """Append one record; floats that are not finite are written as null, which every JSON reader accepts.

        Characters that a terminal would obey, and those that show nothing, are written as escapes (`mifo.printable`).

        Raises:
            CheckpointError: the system refused; the file ends with the line before.
        """
        text = printable_json(json.dumps(_finite(record), ensure_ascii=False))
        line = f"{text}\n".encode()
        path = self.paths[stream]
        try:
            file = self._open(stream)
            whole = os.fstat(file).st_size
            if whole < self._sizes[stream]:  # somebody emptied it, and what was in it is nowhere
                self._lost[stream] = self._lost.get(stream, 0) + self._sizes[stream] - whole
            try:
                write_all(self.storage, file, line)
            except OSError:
                self.storage.truncate(file, whole)
                raise
            finally:
                self._sizes[stream] = os.fstat(file).st_size
        except OSError as error:
            raise CheckpointError(
                f"{path}: a line could not be written ({error.strerror or error}). {_remedy(error)}, then continue with --resume."
            ) from error

    def _open(self, stream: str) -> int:
        path = self.paths[stream]
        if stream not in self._files:
            self._files[stream] = self.storage.open_log(path)
            self._sizes[stream] = os.fstat(self._files[stream]).st_size
        elif not _is_at(self._files[stream], path):
            self._put_back(stream)
        return self._files[stream]

    def _put_back(self, stream: str) -> None:
        """Write a lost file again from the one that is still open."""
        path, lost = self.paths[stream], self._files[stream]
        copy = path.with_name(f".{path.name}.writing")
        copy.unlink(missing_ok=True)
        write_file(self.storage, copy, _blocks(lost, os.fstat(lost).st_size))
        self.storage.rename(copy, path)
        self._files[stream] = self.storage.open_log(path)
        self.storage.close(lost)

    def take_lost(self) -> dict[str, int]:
        """Bytes that somebody cut from each log under way, since the last call."""
        lost, self._lost = self._lost, {}
        return lost

    def sync(self) -> None:
        """Wait until all lines are on the disk; a checkpoint refers to them.

        Raises:
            CheckpointError: the system refused.
        """
        for stream, file in self._files.items():
            try:
                self.storage.sync(file)
            except OSError as error:
                raise CheckpointError(
                    f"{self.paths[stream]} could not be synced ({error.strerror or error}). Mend the disk, then continue "
                    "with --resume."
                ) from error

    def close(self) -> None:
        """Close the files; a later line opens its file again."""
        while self._files:
            self.storage.close(self._files.popitem()[1])

    def state_dict(self) -> dict[str, int]:
        """Bytes written to each file."""
        sizes = {name: path.stat().st_size if path.exists() else 0 for name, path in self.paths.items()}
        return sizes | {name: os.fstat(file).st_size for name, file in self._files.items()}

    def load_state_dict(self, state: Mapping[str, int]) -> dict[str, int]:
        """Cut each file back to the length it had (0 where `state` has none); one that is shorter, to its last whole line.

        Returns:
            The bytes that are missing from each shorter file.

        Raises:
            CheckpointError: the system refused.
        """
        missing = {}
        for name, path in self.paths.items():
            try:
                file = self.storage.open_log(path)
                try:
                    size = os.fstat(file).st_size
                    wanted = state.get(name, 0)
                    kept = wanted if size >= wanted else _whole_lines(file, size)
                    self.storage.truncate(file, kept)
                finally:
                    self.storage.close(file)
            except OSError as error:
                raise CheckpointError(
                    f"{path} cannot be opened for writing ({error.strerror or error}). {_remedy(error)}."
                ) from error
            if kept < wanted:
                missing[name] = wanted - kept
        return missing


def _is_at(file: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(file), path.lstat())
    except FileNotFoundError:
        return False


def _remedy(error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "It is a symbolic link, and logs are never written through one: put the file itself there, or remove the link"
    return "Mend that (free space, permissions, the disk)"


def _blocks(file: int, size: int, start: int = 0) -> Iterator[bytes]:
    """The bytes of an open file from `start` to `size`; fewer where it ends before."""
    while start < size and (block := os.pread(file, min(BLOCK, size - start), start)):
        yield block
        start += len(block)


def _whole_lines(file: int, size: int) -> int:
    """How many of the first `size` bytes of an open file are whole lines; looked for from the end."""
    end = size
    while end > 0:
        start = max(0, end - BLOCK)
        block = b"".join(_blocks(file, end, start))
        if b"\n" in block:
            return start + block.rindex(b"\n") + 1
        end = start
    return 0


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
