"""Token entropies of models on a file of demonstrations: what high-entropy selection would learn, and what SFT sharpened.

Each model reads the same pairs, teacher-forced, the first under the configuration of the others and all in one arithmetic.
For each: the distribution of H(t), and which tokens top-ρ selects within each response (S0 §3.1). For every two: the overlap
of their selections, |K_a ∩ K_b| / |K_a| (both have ⌈ρ|s|⌉ tokens a response). Against the first model: the gap
H_model − H_first at each token (S3 §3.4.1 selects its targets by it).

Legend: T response tokens of all pairs, one after the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mifo.core.select import top_entropy_tokens
from mifo.errors import ConfigError, DataError
from mifo.lab.samples import (
    Compute,
    Pairs,
    PairSettings,
    check_same_settings,
    configuration_note,
    load_source,
    make_policy,
    read_pairs,
)
from mifo.lab.source import Source, Tensors, common_names, find_source, labels_of, types_note
from mifo.train.calibration import quantiles, token_entropies

BINS = 40
SHOWN_TOKENS = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectedToken:
    """A token of the vocabulary: how often it stands in the responses, how often it is selected, its mean entropy."""

    text: str
    occurrences: int
    selected: int
    entropy: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEntropy:
    """One model: `histogram` counts tokens in `edges`; `gap` is H − H_first (empty for the first); `selected` the commonest
    tokens of its selection, `threshold` the mean over responses of the lowest entropy selected."""

    label: str
    entropy: Mapping[str, float]
    histogram: tuple[int, ...]
    threshold: float
    gap: Mapping[str, float]
    fell: float
    selected: tuple[SelectedToken, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionOverlap:
    """Share of the tokens selected by one model that the other selects too; ρ would be expected of independent choices."""

    first: str
    second: str
    share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EntropyReport:
    """Entropies of some models on the same tokens; `sources` are the models as they were given, in the order of `models`."""

    sources: tuple[str, ...] = ()
    data: str
    note: str
    fraction: float
    tokens: int
    edges: tuple[float, ...]
    models: tuple[ModelEntropy, ...]
    overlaps: tuple[SelectionOverlap, ...]

    def record(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each model and token shown."""
        return [{"model": model.label, **asdict(token)} for model in self.models for token in model.selected]


def entropy(
    models: Sequence[str],
    *,
    pairs: PairSettings | None = None,
    fraction: float = 0.2,
    compute: Compute = "stored",
    device: str = "auto",
) -> EntropyReport:
    """Measure token entropies.

    Args:
        models: folders, runs or checkpoints of one architecture; gaps are taken against the first.
        pairs: what to read; template and tokenizer are those of the last model.
        fraction: ρ of the selection, in (0, 1].
        compute: type of weights and arithmetic; "stored" is the widest type in which one of them is stored.
        device: as in `model.device`.

    Raises:
        ConfigError: ρ is out of range.
        ModelError: one is no model, their architectures differ, or two of those after the first compute differently.
        DataError: the file holds no pair that can be used.
    """
    if not 0.0 < fraction <= 1.0:
        raise ConfigError(f"--token-fraction = {fraction:g} must be more than 0 and at most 1.")
    settings = pairs or PairSettings()
    sources = [find_source(given, "MODEL") for given in models]
    stored = [Tensors(source) for source in sources]
    common_names(stored)
    check_same_settings(sources[1:])
    read = read_pairs(sources[-1], settings)
    values = [_measure(source, sources, read, compute, device) for source in sources]
    read = replace(read, note=read.note + configuration_note(sources[0], sources[-1]) + _types(stored, compute))
    report = summarise(labels_of(sources), values, read, fraction=fraction, data=settings.data)
    return replace(report, sources=tuple(models))


def _measure(source: Source, sources: Sequence[Source], pairs: Pairs, compute: Compute, device: str) -> Tensor:
    """Under the configuration and in the arithmetic that all share: gaps are then of the weights alone."""
    model = load_source(source, compute, device, configured_as=sources[-1], beside=sources)
    return torch.cat(token_entropies(make_policy(model), pairs.sequences))


def _types(stored: Sequence[Tensors], compute: Compute) -> str:
    kinds = types_note(stored).partition(":")[0]
    return f" {kinds}; all were computed in {'the widest' if compute == 'stored' else compute}." if kinds else ""


def summarise(
    labels: Sequence[str], values: Sequence[Tensor], pairs: Pairs, *, fraction: float, data: str
) -> EntropyReport:
    """The report from entropies [T] of each model."""
    sequence_T = torch.cat([torch.full((len(p.response_ids),), i) for i, p in enumerate(pairs.sequences)])
    ids = [token for pair in pairs.sequences for token in pair.response_ids]
    if not ids:
        raise DataError(f"--data = '{data}': its demonstrations hold no tokens. Bring others.")
    highest = max(float(v.max()) for v in values)
    edges = torch.linspace(0.0, max(highest, 1e-6), BINS + 1, dtype=torch.float64)
    chosen = [top_entropy_tokens(v, sequence_T, fraction) for v in values]
    models = tuple(
        ModelEntropy(
            label=label,
            entropy=quantiles(value_T),
            histogram=tuple(int(n) for n in torch.histogram(value_T.double().clamp(min=0.0), edges).hist),
            threshold=_threshold(value_T, chosen_T, sequence_T),
            gap=quantiles(value_T - values[0]) if place else {},
            fell=float((value_T < values[0]).float().mean()),
            selected=_selected(ids, value_T, chosen_T, pairs),
        )
        for place, (label, value_T, chosen_T) in enumerate(zip(labels, values, chosen, strict=True))
    )
    overlaps = tuple(
        SelectionOverlap(
            first=labels[i], second=labels[j], share=float((chosen[i] & chosen[j]).sum() / chosen[i].sum())
        )
        for i in range(len(labels))
        for j in range(i + 1, len(labels))
    )
    return EntropyReport(
        data=data,
        note=pairs.note,
        fraction=fraction,
        tokens=len(ids),
        edges=tuple(edges.tolist()),
        models=models,
        overlaps=overlaps,
    )


def _threshold(value_T: Tensor, chosen_T: Tensor, sequence_T: Tensor) -> float:
    lowest = torch.full((int(sequence_T.max()) + 1,), float("inf"))
    lowest = lowest.scatter_reduce(0, sequence_T[chosen_T], value_T[chosen_T].float(), "amin")
    return float(lowest.mean())


def _selected(ids: Sequence[int], value_T: Tensor, chosen_T: Tensor, pairs: Pairs) -> tuple[SelectedToken, ...]:
    occurrences, picked = Counter(ids), Counter[int]()
    sums: Counter[int] = Counter()
    for token, value, chosen in zip(ids, value_T.tolist(), chosen_T.tolist(), strict=True):
        sums[token] += value
        picked[token] += chosen
    return tuple(
        SelectedToken(
            text=str(pairs.chat.tokenizer.decode([token])),
            occurrences=occurrences[token],
            selected=count,
            entropy=sums[token] / occurrences[token],
        )
        for token, count in sorted(picked.items(), key=lambda item: (-item[1], item[0]))[:SHOWN_TOKENS]
        if count
    )
