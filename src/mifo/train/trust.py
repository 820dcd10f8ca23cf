"""What a model may bring along: weights as safetensors and settings as JSON, and no code unless the user asks for it.

Checked before transformers sees the folder. Python code comes in through `auto_map` of config.json and tokenizer_config.json;
pickled weights (`pytorch_model.bin` and the like) run whatever their author put in when they are read, and are refused always.
A tokenizer's chat template is Jinja that transformers renders in its sandbox: it runs no code, but nothing bounds its time.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from mifo.config.schema import ModelConfig
from mifo.errors import ModelError

MAX_DESCRIPTION_BYTES = 64 << 20  # tokenizer_config.json of some models lists a hundred thousand added tokens
INDEX = "model.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
NO_WEIGHTS = ("training_args.bin",)  # left there by trainers, and never read


def check_trust(config: ModelConfig, path: str) -> None:
    """Refuse a model that needs code of its own, unless `model.trust_remote_code` is set.

    Args:
        config: the [model] table.
        path: the folder or hub id that it resolves to.

    Raises:
        ModelError: names the file and the remedy.
    """
    # transformers would otherwise ask a bot for converted weights, and take them from its pull request.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    if config.trust_remote_code:
        return
    for name in ("config.json", "tokenizer_config.json"):
        file = _file(config, path, name)
        if file is not None and "auto_map" in _read(config, file):
            raise ModelError(
                f"model.path = '{config.path}': its {name} asks for Python code that comes with the model (auto_map), and that "
                "code could do whatever you can. If you have read it and trust it, set model.trust_remote_code = true; if "
                f"transformers knows the architecture without it, remove auto_map from a copy of the model's {name}."
            )


def _check_whole(config: ModelConfig, file: Path) -> None:
    """The file's header fits its length: what a copy that broke off does not."""
    try:
        with safe_open(file, framework="pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise ModelError(
            f"model.path = '{config.path}': {file.name} cannot be read ({error}). Copy or fetch the model again."
        ) from error


def check_weights_files(config: ModelConfig, path: str) -> None:
    """Refuse a local folder whose weights are pickled, or whose index names anything but safetensors files beside it.

    Raises:
        ModelError: names the file and the remedy.
    """
    folder = Path(path)
    if not folder.is_dir():  # a hub id: transformers is told to take safetensors only
        return
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"model.path = '{config.path}' holds an adapter (adapter_config.json), which names a model somewhere else. Merge "
            "it into that model, save the result, and name its folder."
        )
    if (folder / "model.safetensors").is_file():
        _check_whole(config, folder / "model.safetensors")
        return
    if (folder / INDEX).is_file():
        shards = _read(config, folder / INDEX).get("weight_map")
        names = set(shards.values()) if isinstance(shards, dict) else {shards}
        wrong = sorted(repr(name) for name in names if not _is_shard(name))
        if wrong:
            raise ModelError(
                f"model.path = '{config.path}': its {INDEX} names {wrong[0]}, which is no safetensors file of that folder. "
                "Fetch the model again from a source you trust."
            )
        for name in sorted(names):
            if (folder / name).is_file():  # whoever reads it says what a missing one means
                _check_whole(config, folder / name)
        return
    pickled = sorted(p.name for kind in PICKLED for p in folder.glob(kind) if p.name not in NO_WEIGHTS)
    if pickled:
        raise ModelError(
            f"model.path = '{config.path}' has its weights only in {pickled[0]}, a pickle, which can run code when it is read. "
            'Ask for a safetensors version. If you trust where the file comes from, convert it once: python -c "from '
            "transformers import AutoModelForCausalLM as M; M.from_pretrained('FOLDER', use_safetensors=False)"
            ".save_pretrained('NEW_FOLDER')\", copy the tokenizer's files, and name the new folder."
        )


def _is_shard(name: Any) -> bool:
    return isinstance(name, str) and name.endswith(".safetensors") and Path(name).name == name


def _file(config: ModelConfig, path: str, name: str) -> Path | None:
    """A file of the model, fetched where `path` is a hub id; None where there is none."""
    if Path(path).is_dir():
        local = Path(path) / name
        return local if local.is_file() else None
    try:
        found = cached_file(path, name, revision=config.revision, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"model.path = '{config.path}': {name} cannot be fetched ({reason}). Give a folder in Hugging Face format with "
            "safetensors weights, or a hub id you can reach."
        ) from error
    return None if found is None else Path(found)


def _read(config: ModelConfig, file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    if size > MAX_DESCRIPTION_BYTES:
        raise ModelError(
            f"model.path = '{config.path}': {file.name} has {size:,} bytes, over {MAX_DESCRIPTION_BYTES:,}; that is no "
            "description of a model. Fetch it again."
        )
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"model.path = '{config.path}': {file.name} cannot be read as JSON ({error}). Fetch it again."
        ) from error
    if not isinstance(described, dict):
        raise ModelError(f"model.path = '{config.path}': {file.name} holds no JSON object. Fetch it again.")
    return described
