"""A plain Hugging Face folder, written piece by piece: what is in memory is some rows of one tensor, not a model.

The folder has the shards of the model it is modelled on, and its configuration, tokenizer and templates.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mifo.errors import ModelError
from mifo.lab.source import WEIGHTS, Tensors
from mifo.train.checkpoint import DTYPES
from mifo.train.trust import INDEX

COPIED = (".json", ".txt", ".jinja", ".model")  # settings, vocabularies, templates; never code, never other weights
NOT_COPIED = ("FILES.json", INDEX)
RECORD = "rejuvenation.json"
TEMPLATES = "additional_chat_templates"  # where transformers keeps all but the default one


def free_place(given: str, field: str) -> Path:
    """The folder to write to, where it is empty or can be made.

    Raises:
        ModelError: names it and the remedy.
    """
    out = Path(given).expanduser().resolve()
    if out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise ModelError(f"{field} = '{out}' is there already and not empty. Name a folder that does not exist yet.")
    if not out.parent.is_dir():
        raise ModelError(f"{field} = '{out}': there is no folder {out.parent}. Make it, or write elsewhere.")
    if not os.access(out.parent, os.W_OK | os.X_OK):
        raise ModelError(
            f"{field} = '{out}': {out.parent} cannot be written to. Change its permissions, or write elsewhere."
        )
    return out


@contextlib.contextmanager
def staged(out: Path, field: str) -> Iterator[Path]:
    """A new folder beside `out` to write to, which becomes `out` if the `with` ends well, and is removed otherwise.

    Raises:
        ModelError: the system refused to write.
    """
    staging = None
    try:
        staging = Path(tempfile.mkdtemp(prefix=f"writing-{out.name}-", dir=out.parent))
        staging.chmod(0o777 & ~_umask())  # mkdtemp's are of the user alone
        yield staging
        if out.is_dir():
            out.rmdir()  # empty, see `free_place`
        staging.rename(out)
    except OSError as error:
        raise ModelError(
            f"{field} = '{out}' cannot be written ({error.strerror or error}). Mend that, or write elsewhere."
        ) from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_model(
    folder: Path, like: Tensors, dtypes: Mapping[str, torch.dtype], make: Callable[[str], Iterable[Tensor]]
) -> None:
    """Write a model into an empty folder.

    Args:
        folder: see `staged`.
        like: the model whose shards, configuration and tokenizer it takes.
        dtypes: type of each tensor, by name.
        make: the tensor of a name, of that type and the shape it has in `like`, as one or more runs of its rows.

    Raises:
        OSError: the system refused to write.
    """
    files: dict[str, list[str]] = {}
    for name, info in like.infos.items():
        files.setdefault(info.file.name, []).append(name)
    for file, names in files.items():
        _write_shard(folder / file, {name: (dtypes[name], like.infos[name].shape) for name in names}, make)
    if set(files) != {WEIGHTS}:  # a single shard of another name is found by the index alone
        _write_index(folder, like, dtypes, files)
    _copy_rest(folder, like, dtypes)


def _write_shard(
    path: Path, entries: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], make: Callable[[str], Iterable[Tensor]]
) -> None:
    """A safetensors file: widest types first, so that every tensor starts at a multiple of its width."""
    order = sorted(entries, key=lambda name: (-entries[name][0].itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name in order:
        dtype, shape = entries[name]
        end = start + torch.Size(shape).numel() * dtype.itemsize
        header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            dtype, shape = entries[name]
            written = 0
            for piece in make(name):
                assert (piece.dtype, tuple(piece.shape[1:])) == (dtype, shape[1:]), name
                written += piece.numel()
                if piece.numel():
                    file.write(memoryview(piece.contiguous().reshape(-1).view(torch.uint8).numpy()))
            assert written == torch.Size(shape).numel(), name


def _write_index(
    folder: Path, like: Tensors, dtypes: Mapping[str, torch.dtype], files: Mapping[str, list[str]]
) -> None:
    size = sum(info.elements * dtypes[name].itemsize for name, info in like.infos.items())
    placed = {name: file for file, names in files.items() for name in names}
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(placed.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _copy_rest(folder: Path, like: Tensors, dtypes: Mapping[str, torch.dtype]) -> None:
    files = [*like.source.folder.iterdir(), *like.source.folder.glob(f"{TEMPLATES}/*.jinja")]
    for file in sorted(files):
        if file.is_file() and file.suffix in COPIED and file.name not in (*NOT_COPIED, RECORD):
            copy = folder / file.relative_to(like.source.folder)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)
    widened = {dtypes[name] for name, info in like.infos.items() if dtypes[name] != info.dtype}
    if widened:  # the type that the configuration names would round them when the model is loaded
        config = like.config | {"dtype": str(max(widened, key=lambda d: d.itemsize)).removeprefix("torch.")}
        config.pop("torch_dtype", None)
        (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
