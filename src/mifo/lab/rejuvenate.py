"""Rejuvenation of an over-trained SFT model before RL (S3 §3.3-3.4, Algorithm 1).

    1  θ_fuse = α θ_over + (1−α) θ_base
    2  targets: of each calibration pair, the N response tokens with the largest |H_over − H_base|
    3  a score for every neuron and target: what it adds to the target's logit in the over-trained model   train.attribution
    4  each target keeps its top ρ of all neurons; S is their union over targets and pairs
    5  rows or columns of S in θ_fuse, biases with their rows, go back to θ_base

The base is measured with the configuration of the over-trained model (its RoPE base, say), as a run does that began with
these weights. One model is in memory at a time, in the type it is stored in (the wider where the two differ) unless told
otherwise; weights are fused, reset and written in runs of rows of bounded size. What the paper leaves open (N, number of
pairs) and its two oddities are settings: |·| also selects tokens whose entropy rose (`signed` takes only those whose entropy
fell), and ranking all modules together mixes exact scores with proxies and favours k and v, whose scores are summed over the
prefix (`per_module_quota`). A run does the same between its stages and intervals (`train.rejuvenate`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mifo.config.schema import Config
from mifo.core.surgery import rejuvenated
from mifo.errors import ConfigError, DataError, ModelError
from mifo.lab.samples import (
    Compute,
    Pairs,
    PairSettings,
    configuration_note,
    load_source,
    make_policy,
    read_pairs,
)
from mifo.lab.source import Source, Tensors, common_names, find_source, model_config
from mifo.lab.writing import RECORD, free_place, staged, write_model
from mifo.train.attribution import projections
from mifo.train.calibration import (
    Calibration,
    Entropies,
    Selection,
    SelectionRules,
    at_places,
    entropies_of,
    reset_elements,
    reset_masks,
    select_neurons,
    token_entropies,
)
from mifo.train.estimate import empty_model


@dataclass(frozen=True, slots=True, kw_only=True)
class RejuvenationSettings:
    """The paper's numbers, and switches for what it leaves open.

    `alpha` is the share of the over-trained model in the fusion; `rho` the share of neurons that each target keeps;
    `targets` is N; `pairs` says what to calibrate on (64 pairs by default).
    """

    alpha: float = 0.5
    rho: float = 0.01
    targets: int = 16
    signed: bool = False
    per_module_quota: bool = False
    pairs: PairSettings = field(default_factory=PairSettings)
    compute: Compute = "stored"
    device: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rejuvenation:
    """What was done; `record` is what stands in the output folder."""

    base: str
    over: str
    settings: RejuvenationSettings
    note: str
    selection: Selection
    reset_neurons: int
    all_neurons: int
    reset_elements: int
    all_elements: int
    entropies: tuple[Entropies, ...]
    target_entropies: Mapping[str, tuple[float, ...]]

    @property
    def neuron_share(self) -> float:
        """Share of all neurons that were reset: the effective ratio after the union."""
        return self.reset_neurons / self.all_neurons if self.all_neurons else 0.0

    @property
    def element_share(self) -> float:
        """Share of all elements of the model that were reset."""
        return self.reset_elements / self.all_elements

    def record(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"neuron_share": self.neuron_share, "element_share": self.element_share}

    def rows(self) -> list[dict[str, Any]]:
        """A row for each projection."""
        return [
            {
                "layer": module.layer,
                "module": module.kind,
                "neurons": module.neurons,
                "reset": len(module.reset),
                "share": len(module.reset) / module.neurons,
            }
            for module in self.selection.modules
        ]


def rejuvenate(base: str, over: str, out: str, settings: RejuvenationSettings) -> Rejuvenation:
    """Write the rejuvenated model of `over` to the folder `out` and say what was done.

    Args:
        base: the model before SFT.
        over: the over-trained model, a folder or a finished run.
        out: a folder that does not exist yet.
        settings: the switches.

    Raises:
        ConfigError: a setting is out of range.
        ModelError: a path is no model, the two differ in architecture, or the family is not supported.
        DataError: the calibration file holds no pair that can be used.
    """
    _check(settings)
    target = free_place(out, "--out")
    sources = find_source(base, "--base"), find_source(over, "--over")
    if sources[1].checkpoint:
        raise ModelError(
            f"--over = '{over}' is a checkpoint of a run, without tokenizer and configuration. Name the run, once it is "
            "finished, or its export."
        )
    tensors = Tensors(sources[0]), Tensors(sources[1])
    common_names(tensors)
    if settings.rho > 0:
        projections(empty_model(Config(model=model_config(sources[1]))))  # refuses families that it does not know
    pairs = read_pairs(sources[1], settings.pairs)
    with staged(target, "--out") as folder:
        return _rejuvenate(folder, tensors, pairs, settings)


def _rejuvenate(
    folder: Path, tensors: tuple[Tensors, Tensors], pairs: Pairs, settings: RejuvenationSettings
) -> Rejuvenation:
    base, over = tensors
    before = _entropies(base.source, over.source, pairs, settings)
    found = _calibrate(tensors, pairs, before, settings)
    _write(folder, tensors, found.selection, settings.alpha)
    written = Source(given=str(folder), field="--out", folder=folder, run=None, checkpoint=False)
    by_model = {"base": before, "over": found.after, "rejuvenated": _entropies(written, written, pairs, settings)}
    done = Rejuvenation(
        base=base.source.given,
        over=over.source.given,
        settings=settings,
        note=pairs.note + configuration_note(base.source, over.source) + _equal_note(before, found.after),
        selection=found.selection,
        **_counts(over, found.selection),
        entropies=tuple(entropies_of(name, values, found.places) for name, values in by_model.items()),
        target_entropies={name: tuple(at_places(values, found.places).tolist()) for name, values in by_model.items()},
    )
    (folder / RECORD).write_text(json.dumps(done.record(), indent=1, ensure_ascii=False), encoding="utf-8")
    return done


def _check(settings: RejuvenationSettings) -> None:
    for name, value in (("--alpha", settings.alpha), ("--rho", settings.rho)):
        if not 0.0 <= value <= 1.0:
            raise ConfigError(f"{name} = {value:g} must be at least 0 and at most 1.")
    for name, count in (("--targets", settings.targets), ("--samples", settings.pairs.count)):
        if count < 1:
            raise ConfigError(f"{name} = {count} must be at least 1.")


def _equal_note(before: Sequence[Tensor], after: Sequence[Tensor]) -> str:
    if all(torch.equal(a, b) for a, b in zip(before, after, strict=True)):
        return " The entropies of --base and --over are the same everywhere, so the targets are arbitrary."
    return ""


def _entropies(source: Source, configured_as: Source, pairs: Pairs, settings: RejuvenationSettings) -> list[Tensor]:
    model = load_source(source, settings.compute, settings.device, configured_as=configured_as, beside=[configured_as])
    return token_entropies(make_policy(model), pairs.sequences)


def _calibrate(
    tensors: tuple[Tensors, Tensors], pairs: Pairs, before: Sequence[Tensor], settings: RejuvenationSettings
) -> Calibration:
    """The neurons to reset; the over-trained model is in memory only here."""
    base, over = tensors
    model = load_source(over.source, settings.compute, settings.device, beside=[base.source])
    rules = SelectionRules(
        rho=settings.rho,
        targets=settings.targets,
        signed=settings.signed,
        per_module_quota=settings.per_module_quota,
    )
    decode = pairs.chat.tokenizer.decode
    found = select_neurons(make_policy(model), pairs.sequences, before, rules, lambda ids: str(decode(list(ids))))
    if settings.rho > 0 and not found.selection.targets:
        raise DataError(
            f"--data = '{settings.pairs.data}': the entropy fell at no response token from --base to --over, so with "
            "--signed there is nothing to reset. Leave --signed out, or name other pairs."
        )
    return found


def _counts(over: Tensors, selection: Selection) -> dict[str, int]:
    elements = {name: info.elements for name, info in over.infos.items()}
    return {
        "reset_neurons": selection.reset_neurons,
        "all_neurons": selection.all_neurons,
        "reset_elements": reset_elements(reset_masks(selection.modules, over.infos), elements),
        "all_elements": sum(elements.values()),
    }


def rows_of(mask: tuple[Tensor, int] | None, start: int, stop: int) -> tuple[Tensor, int] | None:
    """The mask of neurons for rows `start` to `stop` alone."""
    if mask is None or mask[1] == 1:
        return mask
    return mask[0][start:stop], 0


def _write(folder: Path, tensors: tuple[Tensors, Tensors], selection: Selection, alpha: float) -> None:
    base, over = tensors
    masks = reset_masks(selection.modules, over.infos)

    def make(name: str) -> Iterator[Tensor]:
        for start, stop in over.spans(name):
            reset = rows_of(masks.get(name), start, stop)
            yield rejuvenated(over.read(name, start, stop), base.read(name, start, stop), alpha, reset)

    dtypes = {
        name: torch.promote_types(info.dtype, base.infos[name].dtype) if info.dtype.is_floating_point else info.dtype
        for name, info in over.infos.items()
    }
    write_model(folder, over, dtypes, make)
