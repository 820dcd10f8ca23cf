"""The manifest of a checkpoint: which files it has, how long they are, and their SHA-256.

    {"code": {"mifo": ..., "torch": ...}, "files": {"model.safetensors": {"bytes": ..., "sha256": ...}, ...}, "format": 2,
     "settings": SHA-256 of the settings that may not change, "sha256": of the rest of this manifest, "step": ...}

It is written last, so a folder that has one was whole once. A manifest is one line of JSON in one spelling: any other byte in it
is found as surely as in the files it lists. The hashes guard against accidents, not against somebody who makes new ones.
"""

from __future__ import annotations

import errno
import hashlib
import json
import re
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mifo.errors import CheckpointError
from mifo.train.storage import Storage

FORMAT = 2
MANIFEST = "MANIFEST.json"
MAX_BYTES = 1 << 20
CHUNK = 1 << 22
NAME = re.compile(r"[a-z][a-z0-9_]*\.(safetensors|json)")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """Length and hash of one file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a checkpoint says of itself. `settings` is a hash of those that may not change on resume."""

    step: int
    files: Mapping[str, FileEntry]
    code: Mapping[str, str]
    settings: str

    def encode(self) -> bytes:
        """The one spelling of this manifest."""
        body = {"format": FORMAT, **asdict(self)}
        return _spell(body | {"sha256": hashlib.sha256(_spell(body)).hexdigest()})


def _spell(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode("ascii")


class UnreadableError(CheckpointError):
    """The system did not let a checkpoint be read (rights, too many open files): nothing is known against it."""


# What a read ends with where the content is gone, not kept from this user at this time.
_DAMAGED = (errno.EIO, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, getattr(errno, "EUCLEAN", errno.EIO))


def not_read(path: Path | str, error: OSError) -> CheckpointError:
    """The error for a file or folder of a checkpoint that could not be read, which is damage only where the disk says so."""
    reason = error.strerror or str(error)
    if error.errno in _DAMAGED:
        return CheckpointError(f"{path} cannot be read ({reason})")
    right = "search (chmod u+rx)" if Path(path).is_dir() else "read (chmod u+r)"
    remedy = f"Give this user the right to {right} it" if isinstance(error, PermissionError) else "Mend that"
    return UnreadableError(
        f"{path} cannot be read: {reason}. What it holds may be whole, so nothing older is taken in its place. {remedy}, then "
        "continue with --resume."
    )


def read_manifest(folder: Path, storage: Storage | None = None) -> Manifest:
    """The manifest of a checkpoint folder.

    Raises:
        UnreadableError: the system does not let it be read.
        CheckpointError: it is missing, damaged, of another format, or names what it must not; says which.
    """
    path = folder / MANIFEST
    _check_plain_folder(folder)
    try:
        if not stat.S_ISREG(path.lstat().st_mode):  # to open a pipe would wait for its other end
            raise CheckpointError(f"{folder}: {MANIFEST} is no plain file (links, pipes and folders are refused)")
        with (storage or Storage()).open_to_read(path) as file:
            content = file.read(MAX_BYTES + 1)
        value = json.loads(content)
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder}: {MANIFEST} is missing") from error
    except OSError as error:
        raise not_read(path, error) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder}: {MANIFEST} is damaged ({error})") from error
    if not isinstance(value, dict) or "format" not in value:
        raise CheckpointError(f"{folder}: {MANIFEST} is damaged (no manifest)")
    if value["format"] != FORMAT:
        raise CheckpointError(f"{folder}: format {value['format']!r}; this version reads format {FORMAT}")
    try:
        files = {name: FileEntry(**entry) for name, entry in value["files"].items()}
        manifest = Manifest(step=value["step"], files=files, code=value["code"], settings=value["settings"])
        intact = manifest.encode() == content
    except (TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{folder}: {MANIFEST} is damaged ({error})") from error
    for name in files:
        if not NAME.fullmatch(name):
            raise CheckpointError(f"{folder}: {MANIFEST} names {name!r}, which is no name of a file of a checkpoint")
    if not intact:
        raise CheckpointError(f"{folder}: {MANIFEST} is damaged (it does not match its own hash)")
    return manifest


def _check_plain_folder(folder: Path) -> None:
    try:
        mode = folder.lstat().st_mode
    except OSError as error:
        raise not_read(folder, error) from error
    if not stat.S_ISDIR(mode):
        raise CheckpointError(f"{folder}: no folder (a checkpoint is never a link or a file)")


def check_files(folder: Path, manifest: Manifest, *, hashes: bool, storage: Storage | None = None) -> None:
    """Compare a checkpoint with its manifest.

    Args:
        folder: the checkpoint.
        manifest: as `read_manifest` gave it.
        hashes: also read every file and compare its SHA-256.
        storage: the file system.

    Raises:
        UnreadableError: the system does not let a file be read.
        CheckpointError: names the first file that is missing, too much, a link, or of another length or content.
    """
    storage, at = storage or Storage(), folder
    try:
        present = {name: (folder / name).lstat() for name in storage.names(folder)}
        for name in sorted(present.keys() - manifest.files.keys() - {MANIFEST}):
            raise CheckpointError(f"{folder}: {name} does not belong to it (its {MANIFEST} does not list it)")
        for name, status in present.items():
            if not stat.S_ISREG(status.st_mode):
                raise CheckpointError(f"{folder}: {name} is no plain file (links, pipes and folders are refused)")
        for name, entry in manifest.files.items():
            if name not in present:
                raise CheckpointError(f"{folder}: {name} is missing")
            if present[name].st_size != entry.bytes:
                raise CheckpointError(f"{folder}: {name} has {present[name].st_size:,} bytes, not {entry.bytes:,}")
            at = folder / name
            if not hashes:
                storage.open_to_read(at).close()  # whether it may be read is asked for all the same
            elif (found := hash_file(at, storage)) != entry.sha256:
                raise CheckpointError(f"{folder}: {name} is damaged (SHA-256 {found[:12]}…, not {entry.sha256[:12]}…)")
    except OSError as error:
        raise not_read(at, error) from error


def hash_file(path: Path, storage: Storage | None = None) -> str:
    """SHA-256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with (storage or Storage()).open_to_read(path) as file:
        while block := file.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def hash_json(value: Any) -> str:
    """SHA-256 of plain data in one spelling."""
    return hashlib.sha256(_spell(value)).hexdigest()
