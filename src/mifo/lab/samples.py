"""Calibration pairs of a file, and the model that reads them.

A pair is a problem's prompt, rendered as the model's run rendered it, and its demonstration, ended by the
end-of-sequence token. Nothing is sampled and nothing is graded: the model reads the demonstration and its distribution
is measured at each token of it (`train.calibration`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from transformers import PreTrainedModel

from mifo.config.legacy import LegacyConfig
from mifo.config.schema import Config, DataConfig, RolloutConfig
from mifo.data.chat import Chat
from mifo.data.tasks import INSTRUCTION
from mifo.errors import ConfigError, DataError, ModelError
from mifo.lab.source import Source, Tensors, model_config
from mifo.train.build import make_chat
from mifo.train.calibration import demonstrated_pairs
from mifo.train.corpus import EMBEDDED_SPLITS, embedded_available, read_corpus
from mifo.train.device import pick_device
from mifo.train.model import load_model, load_tokenizer, read_model_config
from mifo.train.policy import Policy
from mifo.types import Sequence as TokenSequence
from mifo.types import Verdict

Compute = Literal["stored", "float32", "bfloat16"]
EMBEDDED_DATA = "embedded"
NOT_COMPUTED = {
    *("_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "initializer_range", "pad_token_id"),
    *("max_position_embeddings", "torch_dtype", "transformers_version", "use_cache"),
}
"""Entries of a model's configuration that do not change its distributions."""


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
        ConfigError: `count` or `max_tokens` is below 1.
        DataError: the file holds no demonstration, or none that fits.
        ModelError: the source has no usable tokenizer.
    """
    for name, value in (("--samples", settings.count), ("--max-tokens", settings.max_tokens)):
        if value < 1:
            raise ConfigError(f"{name} = {value} must be at least 1.")
    config = _data_config(source, settings)
    context = int(read_model_config(config.model).max_position_embeddings)
    most = min(settings.max_tokens, context)
    chat = make_chat(config, load_tokenizer(config.model))
    try:
        corpus = read_corpus(config, chat, lambda rows: [Verdict.CORRECT] * len(rows), needs_demonstrations=True)
    except DataError as error:
        message = str(error).replace("data.train", "--data", 1)
        message = message.replace("data.max_prompt_tokens or data.max_demonstration_tokens", "--max-tokens")
        raise DataError(message) from error
    pairs = demonstrated_pairs(corpus)
    _check_ids(source, pairs)
    fitting = [p for p in pairs if len(p.prompt_ids) + len(p.response_ids) <= most]
    if not fitting:
        limit = "the model's context" if most < settings.max_tokens else "--max-tokens"
        raise DataError(
            f"--data = '{settings.data}': none of {len(pairs)} pairs of prompt and demonstration has at most {most} tokens, "
            f"which is {limit}. Raise that, or bring shorter demonstrations."
        )
    chosen = tuple(fitting[: settings.count])
    read = " ".join(note.removeprefix("data.train: ") for note in corpus.notes)
    note = f"{read} Measured on {len(chosen)} pairs, without grading them"
    if len(fitting) < len(pairs):
        note += f"; {len(pairs) - len(fitting)} of more than {most} tokens were left out"
    return Pairs(chosen, chat, f"{note}.")


def _check_ids(source: Source, pairs: Sequence[TokenSequence]) -> None:
    """Tokens have rows in the embedding.

    Raises:
        ModelError: the tokenizer is another model's.
    """
    rows = int(read_model_config(model_config(source)).vocab_size)
    largest = max((max(*pair.prompt_ids, *pair.response_ids) for pair in pairs), default=0)
    if largest >= rows:
        raise ModelError(
            f"{source.field} = '{source.given}': its tokenizer gives token {largest}, and its embedding has {rows} rows. Put the "
            "tokenizer of this model into the folder."
        )


def _data_config(source: Source, settings: PairSettings) -> Config:
    run = source.run.data if source.run is not None else DataConfig()
    embedded = settings.data in EMBEDDED_SPLITS
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
        box_answers=not embedded and run.box_answers,
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
    rollout, legacy = run_endings(source)
    return Config(model=model_config(source), data=data, rollout=rollout, legacy=legacy)


def run_endings(source: Source) -> tuple[RolloutConfig, LegacyConfig]:
    """What ends responses and demonstrations, as the run that made a model had it; the defaults where there is no run."""
    if source.run is None:
        return RolloutConfig(), LegacyConfig()
    return (
        RolloutConfig(stop_texts=source.run.rollout.stop_texts),
        LegacyConfig(append_end=source.run.legacy.append_end),
    )


def load_source(
    source: Source,
    compute: Compute,
    device: str = "auto",
    *,
    configured_as: Source | None = None,
    beside: Sequence[Source] = (),
) -> PreTrainedModel:
    """The model of a source, without gradients of its own. Its memory is free once nobody holds it.

    Args:
        source: where its weights lie.
        compute: type of weights and arithmetic; "stored" keeps that of the files.
        device: as in `model.device`.
        configured_as: the source whose configuration they are loaded into; their own where it is None.
        beside: what it is compared with. "stored" is then the widest type of all, for rounding in one of them would show as a
            difference.
    """
    tensors = Tensors(source)
    if compute == "stored":
        every = [tensors, *map(Tensors, beside)]
        floats = {info.dtype for one in every for info in one.infos.values() if info.dtype.is_floating_point}
        dtype = functools.reduce(torch.promote_types, floats)
    else:
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[compute]
    table = model_config(configured_as or source)
    if source.checkpoint:
        model = load_model(table, dtype=dtype)
        _take_weights(model, tensors)
    else:
        configured = None if configured_as is None else read_model_config(table)
        model = load_model(model_config(source), dtype=dtype, configured=configured)
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


def stored_names(model: PreTrainedModel, tensors: Tensors) -> dict[str, str]:
    """The stored tensor of each parameter by the parameter's name; a file may leave out the prefix of the whole model.

    Raises:
        ModelError: a parameter is stored under another name or in another shape, as fused experts are.
    """
    found = {}
    prefix = f"{model.base_model_prefix}."
    for name, parameter in model.named_parameters():
        stored = next((n for n in (name, name.removeprefix(prefix)) if n in tensors.infos), None)
        if stored is None or tensors.infos[stored].shape != tuple(parameter.shape):
            raise ModelError(
                f"{tensors.source.field} = '{tensors.source.given}': its files hold no tensor for the parameter {name}, of shape "
                f"{list(parameter.shape)}, as it is in memory. Load the model with transformers and save it anew; models "
                "that are stored in another layout than they have in memory cannot be measured here."
            )
        found[name] = stored
    return found


def differing_settings(first: Source, second: Source) -> list[str]:
    """What the configurations of two models set differently that changes how they compute, as `name (first, second)`."""
    own, other = (read_model_config(model_config(source)).to_dict() for source in (first, second))
    return [
        f"{name} ({own.get(name)}, {other.get(name)})"
        for name in sorted((own.keys() | other.keys()) - NOT_COMPUTED)
        if own.get(name) != other.get(name)
    ]


def configuration_note(start: Source, model: Source) -> str:
    """A sentence where a start is measured under a configuration that is not its own; empty where the two agree."""
    differing = differing_settings(start, model)
    if not differing:
        return ""
    names = [source.given if start.field == model.field else source.field for source in (start, model)]
    return (
        f" {names[0]} is measured with the configuration of {names[1]}, under which training began; its own differs: "
        f"{', '.join(differing)}."
    )


def check_same_settings(models: Sequence[Source]) -> None:
    """Models that were trained from one start compute alike, so that it can be measured under their configuration.

    Raises:
        ModelError: names the settings that differ.
    """
    for other in models[1:]:
        differing = differing_settings(models[0], other)
        if differing:
            raise ModelError(
                f"MODEL = '{models[0].given}' and '{other.given}' compute differently: {', '.join(differing)}. Measure them one "
                "by one: the start is measured under the configuration of what it is compared with."
            )


def make_policy(model: PreTrainedModel) -> Policy:
    """The model as the trainer computes it; padded where its weights are too coarse for the check of packing."""
    coarse = next(model.parameters()).dtype not in (torch.float32, torch.float64)
    return Policy(model, layout="padded" if coarse else "auto")
