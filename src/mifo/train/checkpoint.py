"""Checkpoints: safetensors and JSON, committed by a rename.

    checkpoints/step-000120/  model.safetensors  rl.safetensors  sft.safetensors  importance.safetensors
                              state.json  MANIFEST.json

A checkpoint is written to a folder of another name, the manifest last, and renamed when whole; a folder without that name
is never read. Every component keeps its state in one place (`state_dict` or `state_tensors`); this module only names files.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mifo.errors import CheckpointError

FORMAT = 1
PREFIX, STAGING = "step-", "writing-"
STATE, MANIFEST = "state.json", "MANIFEST.json"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All state of a run: named groups of tensors, and everything else as plain data."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]


def save_checkpoint(folder: Path, step: int, snapshot: Snapshot, *, keep: int) -> Path:
    """Write `step-NNNNNN` below `folder`, then drop all but the newest `keep`.

    Args:
        folder: the run's checkpoints folder; made if missing.
        step: number in the name; a checkpoint of the same number is replaced.
        snapshot: what to write.
        keep: how many of the newest stay.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final, staging = folder / f"{PREFIX}{step:06d}", folder / f"{STAGING}{step:06d}"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    for name, tensors in snapshot.tensors.items():
        save_file({key: value.detach().contiguous() for key, value in tensors.items()}, staging / f"{name}.safetensors")
    (staging / STATE).write_text(json.dumps(snapshot.state), encoding="utf-8")
    sizes = {path.name: path.stat().st_size for path in sorted(staging.iterdir())}
    (staging / MANIFEST).write_text(json.dumps({"format": FORMAT, "step": step, "bytes": sizes}), encoding="utf-8")
    if final.exists():
        shutil.rmtree(final)
    os.replace(staging, final)
    for old in list_checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def list_checkpoints(folder: Path) -> list[Path]:
    """Committed checkpoints, oldest first."""
    return sorted(path for path in folder.glob(f"{PREFIX}*") if (path / MANIFEST).is_file())


def load_checkpoint(path: Path) -> Snapshot:
    """Read one checkpoint.

    Raises:
        CheckpointError: a file is missing or has another size than the manifest says; names it.
    """
    manifest = read_json(path / MANIFEST)
    if manifest.get("format") != FORMAT or not isinstance(manifest.get("bytes"), dict):
        raise CheckpointError(f"{path} has format {manifest.get('format')}; this version reads format {FORMAT}.")
    for name, size in manifest["bytes"].items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(
                f"{path}: {name} is missing. Remove this checkpoint folder to resume from the one before."
            )
        if file.stat().st_size != size:
            raise CheckpointError(
                f"{path}: {name} has {file.stat().st_size:,} bytes, not {size:,}. Remove this checkpoint folder to resume "
                "from the one before."
            )
    tensors = {file.stem: _read_tensors(file) for file in sorted(path.glob("*.safetensors"))}
    return Snapshot(tensors, read_json(path / STATE))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a run folder.

    Raises:
        CheckpointError: it is not one; names the file.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}). Resume from an older checkpoint or start again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(
            f"{path} is damaged: it holds no JSON object. Resume from an older checkpoint or start again."
        )
    return value


def _read_tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise CheckpointError(
            f"{file} is damaged ({error}). Remove this checkpoint folder to resume from the one before."
        ) from error
