"""What a path means to the lab: a model folder, a finished run, a checkpoint of a run, or the embedded model.

Weights are read tensor by tensor, and large tensors block by block, so that two models of any size can be compared in
little memory: a file is mapped only while one block of it is copied out. Nothing but safetensors and JSON is read
(`train.trust`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mifo.config.decode import decode
from mifo.config.schema import Config, ModelConfig
from mifo.errors import ConfigError, ModelError
from mifo.train.checkpoint import DTYPES, NAME
from mifo.train.embedded import EMBEDDED
from mifo.train.manifest import MANIFEST
from mifo.train.model import TINY, resolve_model_path
from mifo.train.trust import INDEX, check_trust, check_weights_files

WEIGHTS = "model.safetensors"
BLOCK_ELEMENTS = 1 << 23  # 32 MiB in fp32
NO_WEIGHT = ".rotary_emb.inv_freq"  # a constant that old exports of Llama store and that is computed since
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_OF_NAME = {name: dtype for dtype, name in DTYPES.items()}
_LAYER = re.compile(
    r"^(?:(?:model|model\.decoder|gpt_neox|transformer)\.)?(?:layers|h)\.(\d+)\.(.+?)(?:\.(?:weight|bias))?$"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where the weights of one model lie, and how a run rendered its problems.

    `given` is what the user wrote for `field`. `run` is the configuration of the run that made it, None for other models.
    """

    given: str
    field: str
    folder: Path
    run: Config | None
    checkpoint: bool

    @property
    def label(self) -> str:
        """A short name for tables and figures."""
        path = Path(self.given)
        if self.checkpoint:
            return f"{path.parent.parent.name}/{path.name}"
        return path.parent.name if path.name == "export" else path.name


@dataclass(frozen=True, slots=True)
class Info:
    """Type and shape of a stored tensor, and the file that holds it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        count = 1
        for size in self.shape:
            count *= size
        return count


class Tensors:
    """The stored tensors of a source by name, in natural order; tied weights once.

    Raises:
        ModelError: a shard is missing or damaged, holds numbers of a type that is not supported, or a head that is said to be
            the embedding and is not.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        infos: dict[str, Info] = {}
        for file, promised in _shards(source).items():
            infos |= _contents(file, source, promised)
        infos = {name: info for name, info in infos.items() if not name.endswith(NO_WEIGHT)}
        self.config = {} if source.checkpoint else _read_object(source, source.folder / "config.json")
        self.infos: Mapping[str, Info] = {name: infos[name] for name in sorted(infos, key=natural)}
        if self.config.get("tie_word_embeddings") and HEAD in infos and EMBEDDING in infos:
            self._check_tied()
            self.infos = {name: info for name, info in self.infos.items() if name != HEAD}  # it is the embedding

    def _check_tied(self) -> None:
        same = self.infos[HEAD].shape == self.infos[EMBEDDING].shape
        if not same or any(
            not torch.equal(a, b) for a, b in zip(self.blocks(HEAD), self.blocks(EMBEDDING), strict=True)
        ):
            raise ModelError(
                _say(
                    self.source,
                    f"config.json says tie_word_embeddings = true, and {HEAD} is stored with other values than {EMBEDDING}. Say "
                    "false if the head is its own; else remove the stored head.",
                )
            )

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """A tensor, or its rows from `start` to `stop`, in memory of its own."""
        info = self.infos[name]
        try:
            with safe_open(info.file, framework="pt") as opened:
                if not info.shape:
                    return opened.get_tensor(name).clone()
                rows = info.shape[0] if stop is None else stop
                return opened.get_slice(name)[start:rows].clone()
        except (SafetensorError, OSError) as error:
            raise ModelError(
                _say(self.source, f"{info.file.name} cannot be read ({error}). Fetch it again.")
            ) from error

    def spans(self, name: str) -> Iterator[tuple[int, int]]:
        """(first row, row behind the last) of pieces of bounded size, in order; (0, 1) where a tensor has no rows."""
        info = self.infos[name]
        rows = info.shape[0] if info.shape else 1
        step = max(1, BLOCK_ELEMENTS * rows // max(1, info.elements))
        for start in range(0, rows, step):
            yield start, min(rows, start + step)

    def blocks(self, name: str) -> Iterator[Tensor]:
        """A tensor in flat fp32 pieces of bounded size (fp64 for fp64), in order."""
        for start, stop in self.spans(name):
            block = self.read(name, start, stop).reshape(-1)
            yield block.to(torch.promote_types(block.dtype, torch.float32))


def find_source(given: str, field: str) -> Source:
    """What `given` names: an exported run, a checkpoint of a run, a Hugging Face folder, or the embedded model.

    Args:
        given: as the user wrote it.
        field: the argument it was written for, for messages.

    Raises:
        ModelError: it names no weights that can be read here.
    """
    source = _locate(given, field)
    if not source.folder.is_dir():
        raise ModelError(
            f"{field} = '{given}' is no folder here. The lab reads weights from the disk, piece by piece: fetch the model "
            f"(hf download {given} --local-dir FOLDER) and name the folder, a run, a checkpoint, or '{EMBEDDED}'."
        )
    try:
        check_trust(ModelConfig(path=given), str(source.folder))
        check_weights_files(ModelConfig(path=given), str(source.folder))
    except ModelError as error:
        raise ModelError(_renamed(error, field)) from error
    return source


def _locate(given: str, field: str) -> Source:
    path = Path(given).expanduser()
    if NAME.fullmatch(path.name) and (path / MANIFEST).is_file():
        config = _run_config(path.parent.parent, field)
        return Source(given=given, field=field, folder=path, run=config, checkpoint=True)
    if (path / "metrics.jsonl").is_file() or (path / "checkpoints").is_dir():
        if not (path / "export").is_dir():
            raise ModelError(
                f"{field} = '{given}' is a run without an exported model. Finish it with --resume, or name one of its "
                "checkpoints/step-... folders."
            )
        config = _run_config(path, field)
        return Source(given=given, field=field, folder=path / "export", run=config, checkpoint=False)
    if given == TINY:
        raise ModelError(
            f"{field} = '{TINY}' is made at random from the seed of each run and stored nowhere. Train with --run.keep-phases "
            "and name RUN/phases/step-000000, the weights that the run began with."
        )
    try:
        folder = Path(resolve_model_path(given))
    except ModelError as error:
        raise ModelError(_renamed(error, field)) from error
    return Source(given=given, field=field, folder=folder, run=None, checkpoint=False)


def labels_of(sources: Sequence[Source]) -> list[str]:
    """A name for each source, no two alike: short ones, or as the user wrote them, numbered where even those repeat."""
    for names in ([s.label for s in sources], [s.given for s in sources]):
        if len(set(names)) == len(names):
            return names
    return [f"{s.given} ({number})" for number, s in enumerate(sources, 1)]


def common_names(sources: Sequence[Tensors]) -> tuple[str, ...]:
    """Names of the tensors, which all sources must share with their shapes.

    Raises:
        ModelError: the architectures differ; names the first tensor that does.
    """
    first = sources[0]
    for other in sources[1:]:
        extra = sorted(first.infos.keys() ^ other.infos.keys(), key=natural)
        where = f"{first.source.field} = '{first.source.given}' and {other.source.field} = '{other.source.given}'"
        if extra:
            owner = first if extra[0] in first.infos else other
            raise ModelError(
                f"{where} are different architectures: {len(extra)} tensors are only in one of them, such as {extra[0]} in "
                f"'{owner.source.given}'. Name two checkpoints of the same model."
            )
        for name, info in first.infos.items():
            if other.infos[name].shape != info.shape:
                raise ModelError(
                    f"{where} are different architectures: {name} has shape {list(info.shape)} in the first and "
                    f"{list(other.infos[name].shape)} in the second. Name two checkpoints of the same model."
                )
    return tuple(first.infos)


def types_note(sources: Sequence[Tensors]) -> str:
    """A sentence where the same weights are stored in several types, so that rounding looks like change; else empty."""
    types = {info.dtype for tensors in sources for info in tensors.infos.values() if info.dtype.is_floating_point}
    mixed = any(
        tensors.infos[name].dtype != info.dtype for tensors in sources[1:] for name, info in sources[0].infos.items()
    )
    if not mixed:
        return ""
    listed = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in types))
    return f"The models are stored in different types ({listed}): part of what moved is rounding."


def place_of(name: str) -> tuple[int | None, str]:
    """(layer, module) of a tensor: `model.layers.3.mlp.up_proj.weight` is (3, "mlp.up_proj"); no layer outside the stack."""
    match = _LAYER.match(name)
    if match is not None:
        return int(match[1]), match[2]
    return None, re.sub(r"\.(weight|bias)$", "", name.removeprefix("model."))


def natural(name: str) -> tuple[tuple[int, int, str], ...]:
    """Sorts layer 2 before layer 10."""
    return tuple((0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split("."))


def _shards(source: Source) -> dict[Path, set[str]]:
    """The files with weights, each with the tensors that an index says it holds."""
    index = source.folder / INDEX
    if (source.folder / WEIGHTS).is_file():
        return {source.folder / WEIGHTS: set()}
    if not index.is_file():
        reason = f"the folder has neither {WEIGHTS} nor {INDEX}, so no weights that can be read"
        raise ModelError(_say(source, f"{reason}. Name a model in Hugging Face format with safetensors weights."))
    places: dict[str, str] = _read_object(source, index)["weight_map"]  # of this form: find_source saw to it
    names = sorted(set(places.values()))
    missing = [name for name in names if not (source.folder / name).is_file()]
    if missing:
        reason = f"{len(missing)} of {len(names)} weight files are missing, the first is {missing[0]}"
        raise ModelError(_say(source, f"{reason}. Fetch the model again."))
    return {source.folder / name: {tensor for tensor, place in places.items() if place == name} for name in names}


def _contents(file: Path, source: Source, promised: set[str]) -> dict[str, Info]:
    infos: dict[str, Info] = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for name in sorted(opened.keys()):
                view = opened.get_slice(name)
                dtype = view.get_dtype()
                if dtype not in _OF_NAME:
                    raise ModelError(
                        _say(
                            source,
                            f"{name} is stored as {dtype}, a quantised type. Name the model's unquantised version.",
                        )
                    )
                infos[name] = Info(_OF_NAME[dtype], tuple(view.get_shape()), file)
    except (SafetensorError, OSError) as error:
        raise ModelError(_say(source, f"{file.name} cannot be read ({error}). Fetch it again.")) from error
    lost = sorted(promised - infos.keys(), key=natural)
    if lost:
        raise ModelError(
            _say(
                source,
                f"{file.name} lacks {lost[0]}, which {INDEX} places in it ({len(lost)} are lost). Fetch both again.",
            )
        )
    return infos


def _run_config(folder: Path, field: str) -> Config:
    file = folder / "config.json"
    try:
        return decode(Config, json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError, ConfigError) as error:
        raise ModelError(
            f"{field} = '{folder}': its config.json cannot be read ({error}). Name an exported model instead."
        ) from error


def model_config(source: Source) -> ModelConfig:
    """The [model] table that loads the architecture of a source; of a checkpoint, the model that its run started from."""
    if source.checkpoint:
        assert source.run is not None
        return source.run.model
    plain = ModelConfig(path=str(source.folder))
    if source.run is None:
        return plain
    return replace(plain, device=source.run.model.device, compute=source.run.model.compute)


def _read_object(source: Source, file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(_say(source, f"{file.name} cannot be read ({error}). Fetch it again.")) from error
    if not isinstance(value, dict):
        raise ModelError(_say(source, f"{file.name} holds no JSON object. Fetch it again."))
    return value


def _say(source: Source, text: str) -> str:
    return f"{source.field} = '{source.given}': {text}"


def _renamed(error: ModelError, field: str) -> str:
    """The message of a rule that speaks of model.path, for the argument that the user wrote."""
    return str(error).replace("model.path", field, 1)
