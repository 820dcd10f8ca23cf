"""The run folder: whether a run may begin or go on in it, and the configuration it keeps."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from mifo import __version__
from mifo.config.decode import encode, numbered
from mifo.config.schema import Config
from mifo.errors import CheckpointError
from mifo.train.checkpoint import Checkpoints, Retention, list_checkpoints, read_json
from mifo.train.manifest import hash_json
from mifo.train.storage import Storage, replace_file

MAY_CHANGE_ON_RESUME = (
    "train.steps", "train.minutes", "train.max_flops", "train.max_tokens", "run.", "train.threads", "reward.workers",
    "reward.seconds_per_answer", "reward.worker_memory_mib", "reward.max_failure_share", "reward.failure_window",
    "reward.unsafe_code_execution",
)  # fmt: skip
CONFIG = "config.json"


def check_folder(folder: Path, config: Config, *, resume: bool) -> None:
    """Whether a run of this configuration may start, or go on, in a folder; cheap, so it comes before the data is read.

    A run that was killed before its first checkpoint is resumed from its beginning.

    Raises:
        CheckpointError: the folder cannot be written to, or it holds a run and `resume` is false, or `resume` is true and
            there is nothing to resume or the configuration differs.
    """
    place = next(place for place in (folder, *folder.parents) if place.exists())
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        raise CheckpointError(
            f"{folder} cannot be made or written to: {place} is "
            f"{'not writable' if place.is_dir() else 'no folder'}. Choose another --run.folder."
        )
    has_checkpoint = bool(list_checkpoints(folder / "checkpoints"))
    if resume:
        if not has_checkpoint and not (folder / CONFIG).is_file():
            raise CheckpointError(f"{folder} holds no run to resume. Start it without --resume.")
        _check_same(read_json(folder / CONFIG), encode(config), folder)
    elif has_checkpoint:
        raise CheckpointError(
            f"{folder} already holds a run. Continue it with --resume, choose another --run.name, or delete the folder."
        )
    elif (folder / "metrics.jsonl").is_file():
        raise CheckpointError(
            f"{folder} already holds a run that stopped before its first checkpoint. Begin it again with --resume, or choose "
            "another --run.name."
        )


def check_never_saved(folder: Path) -> None:
    """For a resume that found no checkpoint: there never was one, so that the run may begin again from its start.

    Raises:
        CheckpointError: the log of events tells of one; a disk may not be mounted, or somebody moved the folder.
    """
    events = folder / "events.jsonl"
    if not events.is_file():
        return
    with events.open("rb") as lines:
        saved = any(b'"event": "checkpoint"' in line for line in lines)
    if saved:
        raise CheckpointError(
            f"{folder / 'checkpoints'} holds no checkpoint, but events.jsonl tells of some. Put them back (is their disk "
            "mounted?), then continue with --resume; to begin again, choose another --run.name or delete the folder."
        )


def open_folder(folder: Path, config: Config, storage: Storage) -> None:
    """Make the run folder and write its configuration, once everything that can fail has been loaded.

    Raises:
        CheckpointError: the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(storage, folder / CONFIG, json.dumps(encode(config), indent=2).encode("utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{folder} cannot be written to ({error.strerror or error}). Choose another --run.folder."
        ) from error


def open_checkpoints(folder: Path, config: Config, storage: Storage) -> Checkpoints:
    """The checkpoints of a run folder, kept as the [run] table says."""
    run = config.run
    return Checkpoints(
        folder / "checkpoints",
        retention=Retention(newest=run.keep_checkpoints, every=run.keep_every),
        code={"mifo": __version__, "torch": str(torch.__version__)},
        settings=hash_json(_fixed(encode(config))),
        storage=storage,
    )


def _fixed(settings: dict[str, Any], where: str = "") -> dict[str, Any]:
    """The settings that may not change on resume, flat."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        place = f"{where}.{key}" if where else key
        if isinstance(value, dict):
            flat |= _fixed(value, place)
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for index, table in enumerate(value):
                flat |= _fixed(table, numbered(place, index))
        elif not place.startswith(MAY_CHANGE_ON_RESUME):
            flat[place] = value
    return flat


def _check_same(old: object, new: object, folder: Path, where: str = "") -> None:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            _check_same(old.get(key), new.get(key), folder, f"{where}.{key}" if where else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new) and where == "stages":
        for index, (before, now) in enumerate(zip(old, new, strict=True)):
            _check_same(before, now, folder, numbered(where, index))
    elif old != new and not where.startswith(MAY_CHANGE_ON_RESUME):
        raise CheckpointError(
            f"{folder} was started with {where} = {old!r}, not {new!r}. Resume it with the same settings "
            f"(only {', '.join(MAY_CHANGE_ON_RESUME)} may change), or start another run."
        )
