"""How much of what one phase moved the next phase moves again.

Given checkpoints θ_0, θ_1, ..., θ_n along a run, Δ_i = θ_i − θ_{i−1} is the change of phase i. For phases i < j:

    cosine            ⟨Δ_i, Δ_j⟩ / (‖Δ_i‖ ‖Δ_j‖)
    sign agreement    share of elements that both moved, which both moved the same way
    I_i               the top k of |Δ_i| over all elements, as MIFO's mask without history (S0 §3.2); elements that did not move
                      are never in it
    kept              |I_i ∩ I_j| / |I_i|;     mask churn is 1 − kept
    touched           share of I_i that phase j moved at all
    overwritten       share of I_i that phase j moved the other way by at least as much
    undone            −⟨Δ_i, Δ_j⟩ / ‖Δ_i‖² over I_i: 1 means that phase j took all of it back, negative that it went further

No paper defines "overwritten"; the definition is ours. Everything is exact over the whole model: the thresholds of the
top k come from histograms of the bits of |Δ|, in three passes over the files, so that memory does not grow with the
model.

A run that kept the weights where its phases end (`run.keep_phases`) can be named alone: these are the checkpoints. Where MIFO
froze, its own masks (with history) were kept too, and how much of each the next one holds is given beside.

Legend: E elements of one block.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from mifo.core.select import kept_count
from mifo.core.topk import BINS, LOW_BITS
from mifo.errors import ConfigError, NumericsError
from mifo.lab.source import Tensors, common_names, find_source, labels_of, types_note
from mifo.train.checkpoint import STATE, read_json
from mifo.train.kept_phases import MASK, START, kept_phases

LOW = 1 << LOW_BITS


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseOverlap:
    """How phase `later` treats what phase `earlier` moved; shares are None where nothing was moved."""

    earlier: str
    later: str
    cosine: float | None
    sign_agreement: float | None
    moved_both: float
    kept: float | None
    churn: float | None
    touched: float | None
    overwritten: float | None
    undone: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseChange:
    """One phase: ‖Δ‖, the share of elements it moved, and the size of its top k."""

    name: str
    norm: float
    moved: float
    top: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskChurn:
    """What MIFO froze in one SFT phase and in the next: shares of all elements, and the share of the first that stayed frozen."""

    earlier: str
    later: str
    frozen_earlier: float
    frozen_later: float
    kept: float | None
    churn: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Phases of one run and every pair of them; `masks` of neighbouring SFT phases of a run that kept them; `note` says what
    misleads."""

    checkpoints: tuple[str, ...]
    top: float
    elements: int
    phases: tuple[PhaseChange, ...]
    pairs: tuple[PhaseOverlap, ...]
    masks: tuple[MaskChurn, ...] = ()
    note: str = ""

    def record(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each pair."""
        return [asdict(pair) for pair in self.pairs]


def overlap(checkpoints: Sequence[str], *, top: float = 0.5, names: Sequence[str] | None = None) -> Overlap:
    """Compare what the phases between checkpoints moved.

    Args:
        checkpoints: θ_0 ... θ_n, at least three; or one run that kept its phases.
        top: k, the share of all elements that a phase's mask holds, in (0, 1].
        names: of the phases, n of them; by default the checkpoints they ended in.

    Raises:
        ConfigError: an argument is out of range.
        ModelError: one is no model, or their architectures differ.
        NumericsError: a weight is not finite.
    """
    masks: tuple[MaskChurn, ...] = ()
    if len(checkpoints) == 1:
        kept = _kept(checkpoints[0])
        names = names or [name for name, _ in kept[1:]]
        masks = tuple(_mask_churn([path for _, path in kept]))
        checkpoints = [str(path) for _, path in kept]
    if len(checkpoints) < 3:
        raise ConfigError(
            f"overlap of {len(checkpoints)} checkpoints: two phases need three: start, end of RL, end of SFT."
        )
    if not 0.0 < top <= 1.0:
        raise ConfigError(f"--top = {top:g} must be more than 0 and at most 1.")
    if names is not None and len(names) != len(checkpoints) - 1:
        raise ConfigError(f"--names gives {len(names)} names for {len(checkpoints) - 1} phases. Give one for each.")
    if names is not None and len(set(names)) < len(names):
        raise ConfigError(f"--names {' '.join(names)}: give every phase a name of its own.")
    stored = [Tensors(find_source(given, f"checkpoint {i}")) for i, given in enumerate(checkpoints)]
    changes = _Changes(stored)
    labels = list(names) if names is not None else labels_of([t.source for t in stored[1:]])
    wanted = kept_count(changes.elements, top)
    limits = [_threshold(changes, phase, wanted) for phase in range(len(labels))]
    sums = _sums(changes, limits)
    phases = tuple(
        PhaseChange(name=label, norm=math.sqrt(s.square), moved=s.moved / changes.elements, top=s.top)
        for label, s in zip(labels, sums.phases, strict=True)
    )
    pairs = tuple(
        _pair(labels[i], labels[j], sums.phases[i], sums.phases[j], pair, changes.elements)
        for (i, j), pair in sums.pairs.items()
    )
    return Overlap(
        checkpoints=tuple(checkpoints),
        top=top,
        elements=changes.elements,
        phases=phases,
        pairs=pairs,
        masks=masks,
        note=types_note(stored),
    )


def _kept(run: str) -> list[tuple[str, Path]]:
    """The kept weights of a run with the names of the phases that end there: rl 1, sft 1, rl 2, ...

    Raises:
        ConfigError: it kept none.
    """
    found, counts = list[tuple[str, Path]](), Counter[str]()
    for path in kept_phases(Path(run).expanduser()):
        phase = str(read_json(path / STATE)["phase"])
        counts[phase] += 1
        found.append((phase if phase == START else f"{phase} {counts[phase]}", path))
    if not found:
        raise ConfigError(
            f"overlap of '{run}' alone: it keeps no weights where its phases end. Train with --run.keep-phases, or name three "
            "or more checkpoints."
        )
    return found


def _mask_churn(paths: Sequence[Path]) -> Iterator[MaskChurn]:
    """Of neighbouring masks, tensor by tensor."""
    holding = [path for path in paths if (path / f"{MASK}.safetensors").is_file()]
    for number, (earlier, later) in enumerate(itertools.pairwise(holding), start=1):
        elements = first = second = both = 0
        with (
            safe_open(earlier / f"{MASK}.safetensors", framework="pt") as before,
            safe_open(later / f"{MASK}.safetensors", framework="pt") as after,
        ):
            for name in sorted(before.keys()):
                mask, other = before.get_tensor(name), after.get_tensor(name)
                elements, first, second = elements + mask.numel(), first + int(mask.sum()), second + int(other.sum())
                both += int((mask & other).sum())
        kept = both / first if first else None
        yield MaskChurn(
            earlier=f"sft {number}",
            later=f"sft {number + 1}",
            frozen_earlier=first / elements,
            frozen_later=second / elements,
            kept=kept,
            churn=None if kept is None else 1.0 - kept,
        )


class _Changes:
    """Δ of every phase, block by block."""

    def __init__(self, stored: Sequence[Tensors]) -> None:
        self.stored = stored
        self.names = [name for name in common_names(stored) if stored[0].infos[name].dtype.is_floating_point]
        self.elements = sum(stored[0].infos[name].elements for name in self.names)

    def blocks(self, phases: Sequence[int]) -> Iterator[list[Tensor]]:
        """fp32 changes of some neighbouring phases over the same elements.

        Raises:
            NumericsError: a change is not finite.
        """
        points = range(phases[0], phases[-1] + 2)
        for name in self.names:
            for values in zip(*(self.stored[i].blocks(name) for i in points), strict=True):
                found = [(b.double() - a.double()).float() for a, b in itertools.pairwise(values)]
                for phase, change_E in zip(phases, found, strict=True):
                    if not bool(torch.isfinite(change_E).all()):
                        raise NumericsError(
                            f"{name} changes by numbers that are not finite from '{self.stored[phase].source.given}' to "
                            f"'{self.stored[phase + 1].source.given}'. Name earlier checkpoints."
                        )
                yield found


@dataclass(frozen=True, slots=True)
class _Limit:
    """The top k of |Δ|: all bits above `threshold`, and the first `ties` elements equal to it."""

    threshold: int
    ties: int


def _threshold(changes: _Changes, phase: int, wanted: int) -> _Limit:
    """Of the `wanted` largest |Δ| of a phase that are not zero, by two histograms over their bits."""
    high = torch.zeros(BINS, dtype=torch.int64)
    for (change_E,) in changes.blocks([phase]):
        bits_E = change_E.abs().view(torch.int32)
        high += torch.bincount(bits_E[bits_E > 0] >> LOW_BITS, minlength=BINS)
    wanted = min(wanted, int(high.sum()))
    if wanted == 0:
        return _Limit(1, 0)
    upper, above = _bin_of(high, wanted)
    low = torch.zeros(LOW, dtype=torch.int64)
    for (change_E,) in changes.blocks([phase]):
        bits_E = change_E.abs().view(torch.int32)
        inside_E = bits_E[(bits_E > 0) & ((bits_E >> LOW_BITS) == upper)]
        low += torch.bincount(inside_E & (LOW - 1), minlength=LOW)
    lower, above_inside = _bin_of(low, wanted - above)
    return _Limit((upper << LOW_BITS) | lower, wanted - above - above_inside)


def _bin_of(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bin of the `wanted`-th largest value, and how many lie above that bin."""
    from_top = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, wanted))
    return len(counts) - 1 - place, int(from_top[place - 1]) if place else 0


@dataclass(slots=True)
class _PhaseSums:
    square: float = 0.0
    moved: int = 0
    top: int = 0
    top_square: float = 0.0


@dataclass(slots=True)
class _PairSums:
    product: float = 0.0
    both: int = 0
    same_way: int = 0
    kept: int = 0
    touched: int = 0
    overwritten: int = 0
    top_product: float = 0.0


@dataclass(slots=True)
class _Sums:
    phases: list[_PhaseSums] = field(default_factory=list)
    pairs: dict[tuple[int, int], _PairSums] = field(default_factory=dict)


def _sums(changes: _Changes, limits: Sequence[_Limit]) -> _Sums:
    """Everything that is counted, in one pass."""
    count = len(limits)
    sums = _Sums(
        [_PhaseSums() for _ in limits], {(i, j): _PairSums() for i in range(count) for j in range(i + 1, count)}
    )
    ties = [limit.ties for limit in limits]
    for deltas in changes.blocks(range(count)):
        masks = []
        for phase, delta_E in enumerate(deltas):
            mask_E, used = _mask(delta_E, limits[phase].threshold, ties[phase])
            ties[phase] -= used
            masks.append(mask_E)
            own = sums.phases[phase]
            own.square += float(delta_E.double().square().sum())
            own.moved += int(torch.count_nonzero(delta_E))
            own.top += int(mask_E.sum())
            own.top_square += float(delta_E[mask_E].double().square().sum())
        for (i, j), pair in sums.pairs.items():
            _add(pair, deltas[i], deltas[j], masks[i], masks[j])
    return sums


def _mask(delta_E: Tensor, threshold: int, ties: int) -> tuple[Tensor, int]:
    """Which elements of a block are in the top k, and how many ties at the threshold that took."""
    bits_E = delta_E.abs().view(torch.int32)
    mask_E = bits_E > threshold
    equal = (bits_E == threshold).nonzero()[:ties, 0]
    mask_E[equal] = True
    return mask_E, len(equal)


def _add(pair: _PairSums, earlier_E: Tensor, later_E: Tensor, mask_E: Tensor, later_mask_E: Tensor) -> None:
    product_E = earlier_E.double() * later_E.double()
    pair.product += float(product_E.sum())
    both_E = (earlier_E != 0) & (later_E != 0)
    pair.both += int(both_E.sum())
    pair.same_way += int(((earlier_E > 0) == (later_E > 0))[both_E].sum())
    pair.kept += int((mask_E & later_mask_E).sum())
    before_E, after_E = earlier_E[mask_E], later_E[mask_E]
    pair.touched += int(torch.count_nonzero(after_E))
    pair.overwritten += int(((before_E > 0) != (after_E > 0)).logical_and(after_E.abs() >= before_E.abs()).sum())
    pair.top_product += float(product_E[mask_E].sum())


def _pair(
    earlier: str, later: str, first: _PhaseSums, second: _PhaseSums, pair: _PairSums, elements: int
) -> PhaseOverlap:
    norms = math.sqrt(first.square) * math.sqrt(second.square)

    def share(part: float, whole: float) -> float | None:
        return part / whole if whole else None

    kept = share(pair.kept, first.top)
    return PhaseOverlap(
        earlier=earlier,
        later=later,
        cosine=share(pair.product, norms),
        sign_agreement=share(pair.same_way, pair.both),
        moved_both=pair.both / elements,
        kept=kept,
        churn=None if kept is None else 1.0 - kept,
        touched=share(pair.touched, first.top),
        overwritten=share(pair.overwritten, first.top),
        undone=share(-pair.top_product, first.top_square),
    )
