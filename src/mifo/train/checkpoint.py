"""Checkpoints: safetensors and JSON, committed by a rename, checked by hash when they are read.

    checkpoints/step-000120/  model.safetensors  rl.safetensors  sft.safetensors  importance.safetensors
                              critic.safetensors  critic_optimizer.safetensors  (or prm, where there is one)
                              state.json  MANIFEST.json

A save writes to a folder of another name, syncs every file, writes the manifest last, syncs the folder, renames it, and syncs
the parent: a crash at any moment leaves the older checkpoints and either a whole new one or a folder that is never read. A
committed checkpoint is never written to again; a second one of the same turn is `step-000120.1`.
Every component keeps its state in one place (`state_dict` or `state_tensors`); this module only names files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mifo.errors import CheckpointError
from mifo.train.manifest import (
    CHUNK,
    MANIFEST,
    FileEntry,
    Manifest,
    UnreadableError,
    check_files,
    not_read,
    read_manifest,
)
from mifo.train.storage import Storage, write_file

STAGING, LEAVING = "writing-", "removing-"
STATE = "state.json"
SMALL = 1 << 20
NAME = re.compile(r"step-(\d{6,})(?:\.(\d+))?")
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All state of a run: named groups of tensors, and everything else as plain data."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]

    def copied(self) -> Snapshot:
        """The same on the CPU in memory of its own, so that training may go on: as many bytes as the checkpoint will have."""
        tensors = {
            group: {name: tensor.detach().to("cpu", copy=True) for name, tensor in members.items()}
            for group, members in self.tensors.items()
        }
        return Snapshot(tensors, json.loads(json.dumps(self.state)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Which checkpoints stay: the `newest`, and all whose step is a multiple of `every`."""

    newest: int
    every: int | None = None

    def drops(self, paths: list[Path]) -> list[Path]:
        """Those of `paths` (oldest first) that need not stay."""
        older = paths[: -self.newest]
        return [path for path in older if self.every is None or _place(path)[0] % self.every]


class Checkpoints:
    """The checkpoints folder of a run.

    Args:
        folder: made at the first save.
        retention: which of them stay.
        code: versions to write into manifests.
        settings: hash of the settings that may not change; a checkpoint of other settings is not this run's.
        storage: the file system.
    """

    def __init__(
        self, folder: Path, *, retention: Retention, code: Mapping[str, str], settings: str, storage: Storage
    ) -> None:
        self.folder, self.retention, self.code, self.settings = folder, retention, code, settings
        self.storage = storage
        self._bad: set[Path] = set()
        self._not_removed: list[tuple[Path, str]] = []
        self._told: set[Path] = set()

    def list(self) -> list[Path]:
        """Committed checkpoints, oldest first; nothing is looked at but their names."""
        return list_checkpoints(self.folder, self.storage)

    def take_not_removed(self) -> list[tuple[Path, str]]:
        """What saves since the last call should have removed and could not, each once, and why; a save may be under way."""
        return [self._not_removed.pop(0) for _ in range(len(self._not_removed))]

    def save(self, step: int, snapshot: Snapshot) -> Path:
        """Write and commit a checkpoint, then drop those that need not stay; one that cannot be dropped is only noted.

        Raises:
            CheckpointError: the system refused an operation; says which, and what still stands.
        """
        staging = self.folder / f"{STAGING}{step:06d}"
        try:
            self._make_room()
            self.storage.make_folder(staging)
            final = self._commit(staging, step, snapshot)
        except OSError as error:
            with contextlib.suppress(OSError):  # frees what a full disk needs; the next save tries again
                self.storage.remove_tree(staging)
            raise CheckpointError(self._failure(step, error)) from error
        self._drop_old()
        return final

    def _make_room(self) -> None:
        """The folder, without what a crash left in it."""
        for missing in reversed([p for p in (self.folder, *self.folder.parents) if not p.exists()]):
            self.storage.make_folder(missing)
            self.storage.sync_folder(missing.parent)
        for path in [*self.folder.glob(f"{STAGING}*"), *self.folder.glob(f"{LEAVING}*")]:
            self._remove(path)

    def _remove(self, path: Path) -> None:
        """A committed checkpoint loses its name first, so that a crash leaves no half of it under that name."""
        try:
            if NAME.fullmatch(path.name):
                leaving = path.with_name(LEAVING + path.name)
                self.storage.rename(path, leaving)
                path = leaving
                self.storage.sync_folder(self.folder)
            self.storage.remove_tree(path)
        except OSError as error:  # a committed checkpoint is no less committed for it; the next save tries again
            if path not in self._told:
                place = f" ({error.filename})" if error.filename else ""
                self._not_removed.append((path, f"{error.strerror or error}{place}"))
            self._told.add(path)

    def _commit(self, staging: Path, step: int, snapshot: Snapshot) -> Path:
        files = {}
        for group, tensors in snapshot.tensors.items():
            files[f"{group}.safetensors"] = self._write(staging / f"{group}.safetensors", tensor_chunks(tensors))
        state = json.dumps(snapshot.state).encode("utf-8")
        files[STATE] = self._write(staging / STATE, iter([state]))
        manifest = Manifest(step=step, files=files, code=self.code, settings=self.settings)
        write_file(self.storage, staging / MANIFEST, [manifest.encode()])
        self.storage.sync_folder(staging)
        final = self._free_name(step)
        self.storage.rename(staging, final)
        self.storage.sync_folder(self.folder)
        return final

    def _write(self, path: Path, chunks: Iterator[bytes | memoryview]) -> FileEntry:
        digest, size = hashlib.sha256(), 0

        def seen() -> Iterator[bytes | memoryview]:
            nonlocal size
            for chunk in gathered(chunks):
                digest.update(chunk)
                size += len(chunk)
                yield chunk

        write_file(self.storage, path, seen())
        return FileEntry(size, digest.hexdigest())

    def _free_name(self, step: int) -> Path:
        """step-000120, or with the next free part where this step has checkpoints, good or bad."""
        parts = [place[1] for place in map(_place, self.list()) if place[0] == step]
        return self.folder / (f"step-{step:06d}.{max(parts) + 1}" if parts else f"step-{step:06d}")

    def _drop_old(self) -> None:
        good = [path for path in self.list() if path not in self._bad]
        drop = self.retention.drops(good)
        oldest = _place(good[-self.retention.newest :][0])
        drop += [path for path in self._bad if path.exists() and _place(path) < oldest]
        for path in drop:
            self._remove(path)

    def _failure(self, step: int, error: OSError) -> str:
        place = f" ({error.filename})" if error.filename else ""
        whole = self.list()
        stands = f"the newest whole one is {whole[-1].name}" if whole else "there is no older one"
        return (
            f"{self.folder}: the checkpoint of turn {step} could not be written: {error.strerror or error}{place}; {stands}. "
            "Mend that (free space, permissions, the disk), then continue with --resume."
        )

    def newest_good(self, *, verify: bool) -> tuple[Path | None, list[str]]:
        """The newest checkpoint that is whole (None: there is none at all), and what is wrong with each newer one.

        Args:
            verify: compare the hash of every file; without it only names and sizes are looked at.

        Raises:
            UnreadableError: the system does not let one be read; it may be whole, so it is not passed over.
            CheckpointError: there are some, and none is whole; says what is wrong with each.
        """
        reasons: list[str] = []
        for path in reversed(self.list()):
            try:
                manifest = read_manifest(path, self.storage)
                check_files(path, manifest, hashes=verify, storage=self.storage)
                if manifest.step != _place(path)[0]:
                    raise CheckpointError(
                        f"{path}: its manifest is of turn {manifest.step}, so the folder was renamed, or copied from another"
                    )
                if manifest.settings != self.settings:
                    raise CheckpointError(f"{path}: it was made by a run with other settings")
            except UnreadableError:
                raise
            except CheckpointError as error:
                reasons.append(str(error))
                self._bad.add(path)
                continue
            return path, reasons
        if not reasons:
            return None, []
        listed = "".join(f"\n  {reason}" for reason in reasons)
        raise CheckpointError(f"{self.folder} holds no whole checkpoint. Start another run.{listed}")


def list_checkpoints(folder: Path, storage: Storage | None = None) -> list[Path]:
    """Committed checkpoints below a folder, oldest first; nothing is looked at but their names. None where it is missing.

    Raises:
        CheckpointError: the system does not let the folder be read.
    """
    try:
        names = (storage or Storage()).names(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise not_read(folder, error) from error
    return sorted((folder / name for name in names if NAME.fullmatch(name)), key=_place)


def _place(path: Path) -> tuple[int, int]:
    match = NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1]), int(match[2] or 0)


def tensor_chunks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, piece by piece: the library's own writer holds a second copy and cannot be interposed.

    Widest dtypes first, then by name, as the library orders them: every tensor starts at a multiple of its width.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {}
    start = 0
    for name in order:
        tensor = tensors[name]
        end = start + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        flat = tensors[name].detach().to("cpu").contiguous().reshape(-1)
        if flat.numel():
            whole = memoryview(flat.view(torch.uint8).numpy())
            yield from (whole[i : i + CHUNK] for i in range(0, len(whole), CHUNK))


def gathered(chunks: Iterator[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """The same bytes in fewer pieces: small ones join, so that a hundred little tensors are not a hundred writes."""
    small = bytearray()
    for chunk in chunks:
        if len(chunk) < SMALL:
            small += chunk
        if len(small) >= SMALL or (small and len(chunk) >= SMALL):
            yield bytes(small)
            small.clear()
        if len(chunk) >= SMALL:
            yield chunk
    if small:
        yield bytes(small)


def load_checkpoint(path: Path) -> Snapshot:
    """Read a checkpoint that was found whole. Tensors are mapped from its files: copy what is to be kept.

    Raises:
        CheckpointError: a file cannot be read after all; names it.
    """
    manifest = read_manifest(path)
    tensors = {}
    for name in manifest.files:
        if name.endswith(".safetensors"):
            tensors[name.removesuffix(".safetensors")] = _read_tensors(path / name)
    return Snapshot(tensors, read_json(path / STATE))


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except OSError as error:
        raise not_read(file, error) from error
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is damaged ({error}). Resume without --no-verify to find a whole one."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a run folder.

    Raises:
        CheckpointError: it is not one; names the file.
    """
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is no file. Put it back from a copy, or start again.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing. Put it back from a copy, or start again.") from error
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror or error}). Mend that (the rights of the file and its folder, the disk), or "
            "put it back from a copy."
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged ({error}). Put it back from a copy, or start again.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} is damaged: it holds no JSON object. Put it back from a copy, or start again.")
    return value
