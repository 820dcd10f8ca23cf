"""Rejuvenation of an over-trained SFT model before RL (S3 §3.3-3.4, Algorithm 1; METHODS 9).

    1  θ_fuse = α θ_over + (1−α) θ_base
    2  targets: of each calibration pair, the N response tokens with the largest |H_over − H_base|
    3  a score for every neuron and target: what it adds to the target's logit in the over-trained model     lab.attribution
    4  each target keeps its top ρ of all neurons; S is their union over targets and pairs
    5  rows or columns of S in θ_fuse, biases with their rows, go back to θ_base

One model is in memory at a time, in the type it is stored in unless told otherwise; weights are fused and reset tensor
by tensor. What the paper leaves open (N, number of pairs) and its two oddities are settings: |·| also selects tokens
whose entropy rose (`signed` takes only those whose entropy fell), and ranking all modules together mixes exact scores
with proxies and favours k and v, whose scores are summed over the prefix (`per_module_quota`).
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mifo.core.surgery import fuse, reset_neurons, top_neurons
from mifo.errors import ConfigError, DataError, ModelError
from mifo.lab.attribution import WRITERS, Attribution, Module, Target
from mifo.lab.samples import (
    Compute,
    Pairs,
    PairSettings,
    load_source,
    make_policy,
    quantiles,
    read_pairs,
    token_entropies,
)
from mifo.lab.source import Source, Tensors, common_names, find_source
from mifo.lab.writing import RECORD, check_free, staged, write_model
from mifo.types import Sequence as TokenSequence

log = logging.getLogger(__name__)

SHOWN_TOKENS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class RejuvenationSettings:
    """Switches of METHODS 9.

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
class ModuleReset:
    """What was reset of one projection: indices of rows (q, k, v, gate, up) or columns (o, down)."""

    name: str
    layer: int
    kind: str
    neurons: int
    reset: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The neurons to reset, and what led to them.

    `modules` is empty where nothing was scored (rho = 0). `reconstruction_error` is |z̃ − z| over targets, in logits; `gap` is
    H_over − H_base at the targets, in nats; `tokens` are the commonest targets as text; `picked_by_half` counts the neurons that
    at least half of the targets picked, a measure of how much their choices agree. Figures over nothing are empty.
    """

    modules: tuple[ModuleReset, ...]
    targets: int
    reconstruction_error: Mapping[str, float]
    tokens: tuple[tuple[str, int], ...]
    gap: Mapping[str, float]
    picked_by_half: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Entropies:
    """Token entropies of one model in nats: over all response tokens, and over the targets (empty where there are none)."""

    model: str
    tokens: Mapping[str, float]
    targets: Mapping[str, float]


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
    target = Path(out).expanduser()
    check_free(target, "--out")
    sources = find_source(base, "--base"), find_source(over, "--over")
    if any(source.checkpoint for source in sources):
        which = next(s for s in sources if s.checkpoint)
        raise ModelError(
            f"{which.field} = '{which.given}' is a checkpoint of a run, without tokenizer and configuration. Name the run, once "
            "it is finished, or its export."
        )
    tensors = Tensors(sources[0]), Tensors(sources[1])
    common_names(tensors)
    pairs = read_pairs(sources[1], settings.pairs)
    with staged(target, "--out") as folder:
        return _rejuvenate(folder, tensors, pairs, settings)


def _rejuvenate(
    folder: Path, tensors: tuple[Tensors, Tensors], pairs: Pairs, settings: RejuvenationSettings
) -> Rejuvenation:
    base, over = tensors
    before = _entropies(base.source, pairs, settings)
    selection, after = _select(over, pairs, before, settings)
    _write(folder, tensors, selection, settings.alpha)
    written = Source(given=str(folder), field="--out", folder=folder, run=None, checkpoint=False)
    by_model = {"base": before, "over": after, "rejuvenated": _entropies(written, pairs, settings)}
    places = _chosen_places(before, after, settings)
    done = Rejuvenation(
        base=base.source.given,
        over=over.source.given,
        settings=settings,
        note=pairs.note,
        selection=selection,
        **_counts(over, selection),
        entropies=tuple(_summary(name, values, places) for name, values in by_model.items()),
        target_entropies={name: tuple(_at(values, places).tolist()) for name, values in by_model.items()},
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


def _entropies(source: Source, pairs: Pairs, settings: RejuvenationSettings) -> list[Tensor]:
    model = load_source(source, settings.compute, settings.device)
    return token_entropies(make_policy(model), pairs.sequences)


def target_places(before_T: Tensor, after_T: Tensor, count: int, *, signed: bool) -> list[int]:
    """Response positions of the N largest |H_over − H_base|, ties to the earlier, in order of position.

    Args:
        before_T: entropies of the base, [T].
        after_T: entropies of the over-trained model, [T].
        count: N; fewer where the response is shorter.
        signed: only where the entropy fell.
    """
    fall_T = before_T - after_T
    gap_T = fall_T if signed else fall_T.abs()
    order = torch.argsort(gap_T, descending=True, stable=True)[:count]
    return sorted(place for place in order.tolist() if not signed or fall_T[place] > 0)


def _chosen_places(
    before: Sequence[Tensor], after: Sequence[Tensor], settings: RejuvenationSettings
) -> list[list[int]]:
    return [target_places(b, a, settings.targets, signed=settings.signed) for b, a in zip(before, after, strict=True)]


def _select(
    over: Tensors, pairs: Pairs, before: Sequence[Tensor], settings: RejuvenationSettings
) -> tuple[Selection, list[Tensor]]:
    """The neurons to reset, and the entropies of the over-trained model."""
    modules: tuple[Module, ...] = ()
    picks_S, errors = torch.zeros(0, dtype=torch.int64), torch.zeros(0)
    model = load_source(over.source, settings.compute, settings.device)
    after = token_entropies(make_policy(model), pairs.sequences)
    places = _chosen_places(before, after, settings)
    if settings.rho > 0:
        if not any(places):
            raise DataError(
                f"--data = '{settings.pairs.data}': the entropy fell at no response token from --base to --over, so with "
                "--signed there is nothing to reset. Leave --signed out, or name other pairs."
            )
        with Attribution(model) as attribution:
            modules = attribution.modules
            picks_S, errors = _picks(attribution, pairs.sequences, places, settings)
    decode = pairs.chat.tokenizer.decode
    chosen = [pair.response_ids[p] for pair, some in zip(pairs.sequences, places, strict=True) for p in some]
    selection = Selection(
        modules=_module_resets(modules, picks_S),
        targets=len(chosen),
        reconstruction_error=quantiles(errors),
        tokens=tuple((str(decode([token])), count) for token, count in Counter(chosen).most_common(SHOWN_TOKENS)),
        gap=quantiles(_at(after, places) - _at(before, places)),
        picked_by_half=int((2 * picks_S >= len(chosen)).sum()),
    )
    return selection, after


def _picks(
    attribution: Attribution,
    pairs: Sequence[TokenSequence],
    places: Sequence[Sequence[int]],
    settings: RejuvenationSettings,
) -> tuple[Tensor, Tensor]:
    """How many targets picked each neuron, int64 [S], and |z̃ − z| of every target."""
    sizes = [module.neurons for module in attribution.modules]
    picks_S = torch.zeros(sum(sizes), dtype=torch.int64)
    errors: list[float] = []
    for number, (pair, chosen) in enumerate(zip(pairs, places, strict=True), 1):
        first = len(pair.prompt_ids) - 1
        targets = [Target(first + place, pair.response_ids[place]) for place in chosen]
        ids = (*pair.prompt_ids, *pair.response_ids)[: first + chosen[-1] + 1] if chosen else ()
        for scores in attribution.scores(ids, targets) if chosen else ():
            errors.append(abs(scores.reconstructed - scores.logit))
            picks_S += top_neurons(scores.scores_S, sizes, settings.rho, per_module=settings.per_module_quota)
        log.info("attributed %d of %d pairs", number, len(pairs))
    return picks_S, torch.tensor(errors)


def _module_resets(modules: Sequence[Module], picks_S: Tensor) -> tuple[ModuleReset, ...]:
    pieces = picks_S.split([module.neurons for module in modules])
    return tuple(
        ModuleReset(
            name=module.name,
            layer=module.layer,
            kind=module.kind,
            neurons=module.neurons,
            reset=tuple(piece.nonzero()[:, 0].tolist()),
        )
        for module, piece in zip(modules, pieces, strict=True)
    )


def reset_masks(modules: Sequence[ModuleReset], stored: Container[str]) -> dict[str, tuple[Tensor, int]]:
    """(mask of neurons, dimension of the tensor that counts them) for each stored tensor with some to reset.

    The bias of a row goes with it; the bias of a writer belongs to no neuron and stays.
    """
    masks: dict[str, tuple[Tensor, int]] = {}
    for module in modules:
        if not module.reset:
            continue
        mask = torch.zeros(module.neurons, dtype=torch.bool)
        mask[list(module.reset)] = True
        dimension = 1 if module.kind in WRITERS else 0
        masks[f"{module.name}.weight"] = (mask, dimension)
        if dimension == 0 and f"{module.name}.bias" in stored:
            masks[f"{module.name}.bias"] = (mask, 0)
    return masks


def _counts(over: Tensors, selection: Selection) -> dict[str, int]:
    masks = reset_masks(selection.modules, over.infos)
    elements = {name: info.elements for name, info in over.infos.items()}
    return {
        "reset_neurons": sum(len(m.reset) for m in selection.modules),
        "all_neurons": sum(m.neurons for m in selection.modules),
        "reset_elements": sum(elements[name] // len(mask) * int(mask.sum()) for name, (mask, _) in masks.items()),
        "all_elements": sum(elements.values()),
    }


def _write(folder: Path, tensors: tuple[Tensors, Tensors], selection: Selection, alpha: float) -> None:
    base, over = tensors
    masks = reset_masks(selection.modules, over.infos)

    def make(name: str) -> Tensor:
        before = base.read(name)
        fused = fuse(over.read(name), before, alpha)
        return reset_neurons(fused, before, *masks[name]) if name in masks else fused

    dtypes = {
        name: torch.promote_types(info.dtype, base.infos[name].dtype) if info.dtype.is_floating_point else info.dtype
        for name, info in over.infos.items()
    }
    write_model(folder, over, dtypes, make)


def _at(values: Sequence[Tensor], places: Sequence[Sequence[int]]) -> Tensor:
    return torch.cat([row[torch.tensor(chosen, dtype=torch.int64)] for row, chosen in zip(values, places, strict=True)])


def _summary(name: str, values: Sequence[Tensor], places: Sequence[Sequence[int]]) -> Entropies:
    return Entropies(model=name, tokens=quantiles(torch.cat(list(values))), targets=quantiles(_at(values, places)))
