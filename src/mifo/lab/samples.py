"""Calibration pairs of a file, and the model that reads them.

A pair is a problem's prompt, rendered as the model's run rendered it, and its demonstration, ended by the
end-of-sequence token. Nothing is sampled and nothing is graded: the model reads the demonstration and its distribution
is measured at each token of it (`train.calibration`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from transformers import PreTrainedModel

from mifo.config.schema import Config, DataConfig
from mifo.data.chat import Chat
from mifo.data.tasks import INSTRUCTION
from mifo.errors import DataError, ModelError
from mifo.lab.source import Source, Tensors, model_config
from mifo.train.build import make_chat
from mifo.train.calibration import demonstrated_pairs
from mifo.train.corpus import embedded_available, read_corpus
from mifo.train.device import pick_device
from mifo.train.model import load_model, load_tokenizer
from mifo.train.policy import Policy
from mifo.types import Sequence as TokenSequence
from mifo.types import Verdict

Compute = Literal["stored", "float32", "bfloat16"]
EMBEDDED_DATA = "embedded"


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSettings:
    """Which pairs to measure on.

    `template` and `system_prompt` are those of the run where they are None and the model comes from a run. `max_tokens` bounds
    prompt and demonstration together; longer pairs are left out and counted.
    """

    data: str = EMBEDDED_DATA
    split: str | None = None
    count: int = 64
    max_tokens: int = 2048
    template: str | None = None
    system_prompt: str | None = None


@dataclass(frozen=True, slots=True)
class Pairs:
    """Pairs as token ids with the tokenizer that made them; `note` says where they are from and what was left out."""

    sequences: tuple[TokenSequence, ...]
    chat: Chat
    note: str


def read_pairs(source: Source, settings: PairSettings) -> Pairs:
    """The first `count` pairs of a file that fit, with the tokenizer and template of `source`.

    Raises:
        DataError: the file holds no demonstration, or none that fits.
        ModelError: the source has no usable tokenizer.
    """
    config = _data_config(source, settings)
    chat = make_chat(config, load_tokenizer(config.model))
    corpus = read_corpus(config, chat, lambda rows: [Verdict.CORRECT] * len(rows), needs_demonstrations=True)
    pairs = demonstrated_pairs(corpus)
    fitting = [p for p in pairs if len(p.prompt_ids) + len(p.response_ids) <= settings.max_tokens]
    if not fitting:
        raise DataError(
            f"--data = '{settings.data}': none of {len(pairs)} pairs of prompt and demonstration has at most "
            f"{settings.max_tokens} tokens. Raise --max-tokens, or bring shorter demonstrations."
        )
    chosen = tuple(fitting[: settings.count])
    note = f"{' '.join(corpus.notes)} Measured on {len(chosen)} pairs"
    if len(fitting) < len(pairs):
        note += f"; {len(pairs) - len(fitting)} of more than {settings.max_tokens} tokens were left out"
    return Pairs(chosen, chat, f"{note}.")


def _data_config(source: Source, settings: PairSettings) -> Config:
    run = source.run.data if source.run is not None else DataConfig()
    embedded = settings.data.startswith(EMBEDDED_DATA)
    template = settings.template or (run.template if source.run is not None else "tokenizer")
    prompt = settings.system_prompt if settings.system_prompt is not None else run.system_prompt
    if embedded and prompt is None and source.run is None and template == "tokenizer":
        prompt = INSTRUCTION  # embedded problems do not say that the answer belongs in a box
    data = replace(
        DataConfig(),
        families=run.families if embedded else (),
        levels=run.levels if embedded else None,
        labels=() if embedded else run.labels,
        instruction=None if embedded else run.instruction,
        train=settings.data,
        train_problems=settings.count if embedded else None,
        split=settings.split or "train",
        evaluation="none",
        template=template,
        system_prompt=prompt,
        max_prompt_tokens=settings.max_tokens,
        max_demonstration_tokens=settings.max_tokens,
        verify_demonstrations=False,
    )
    most = embedded_available(data, "train")
    if most is not None:
        data = replace(data, train_problems=min(settings.count, most))
    return Config(model=model_config(source), data=data)


def load_source(source: Source, compute: Compute, device: str = "auto") -> PreTrainedModel:
    """The model of a source, without gradients of its own. Its memory is free once nobody holds it.

    Args:
        source: where its weights lie.
        compute: type of weights and arithmetic; "stored" keeps that of the files.
        device: as in `model.device`.
    """
    tensors = Tensors(source)
    if compute == "stored":
        floats = [info.dtype for info in tensors.infos.values() if info.dtype.is_floating_point]
        dtype = max(floats, key=lambda d: d.itemsize)
    else:
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[compute]
    model = load_model(model_config(source), dtype=dtype)
    if source.checkpoint:
        _take_weights(model, tensors)
    model.requires_grad_(False).eval()
    return model.to(pick_device(device))


def _take_weights(model: PreTrainedModel, tensors: Tensors) -> None:
    """Put the weights of a checkpoint into the model that its run started from."""
    parameters = dict(model.named_parameters())
    if parameters.keys() != tensors.infos.keys():
        unknown = sorted(parameters.keys() ^ tensors.infos.keys())[0]
        raise ModelError(
            f"{tensors.source.field} = '{tensors.source.given}': the checkpoint does not fit model.path of its run "
            f"({unknown} is only in one of them). Put that model back as it was, or name the run's export."
        )
    for name, parameter in parameters.items():
        parameter.data.copy_(tensors.read(name))


def make_policy(model: PreTrainedModel) -> Policy:
    """The model as the trainer computes it; padded where its weights are too coarse for the check of packing."""
    coarse = next(model.parameters()).dtype not in (torch.float32, torch.float64)
    return Policy(model, layout="padded" if coarse else "auto")
