"""How far training moved each layer and module: ‖θ_T − θ_0‖₂ and its company (S0 §2.2, Figure 1).

Two checkpoints are compared block by block: memory does not grow with the model. Differences are made in fp32 and
summed in fp64. The paper gives the norm alone; the relative norm, the share of elements that did not move at all and
the largest changes stand beside it, since bf16 checkpoints and sparse updates are read wrongly from norms alone.

Legend: E elements of one block.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mifo.errors import ConfigError, NumericsError
from mifo.lab.source import Tensors, common_names, find_source, labels_of, place_of, types_note

LARGEST = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class ElementChange:
    """One element: where, its value before, and what was added."""

    index: tuple[int, ...]
    before: float
    change: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorChange:
    """The change of one tensor.

    `unchanged` is the share of elements with exactly zero change; `largest` are the largest changes by absolute value.
    """

    name: str
    layer: int | None
    module: str
    elements: int
    norm: float
    norm_before: float
    unchanged: float
    largest: tuple[ElementChange, ...]

    @property
    def relative(self) -> float:
        """‖Δ‖/‖θ_0‖; infinite where the tensor was zero and moved."""
        return _ratio(self.norm, self.norm_before)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupChange:
    """The change of some tensors together: a module of a layer with its bias, a layer, or the model."""

    layer: int | None
    module: str
    elements: int
    norm: float
    norm_before: float
    unchanged: float

    @property
    def relative(self) -> float:
        """‖Δ‖/‖θ_0‖."""
        return _ratio(self.norm, self.norm_before)


@dataclass(frozen=True, slots=True, kw_only=True)
class Magnitude:
    """What moved between two checkpoints; `label` names the second in tables and figures, `note` says what misleads."""

    before: str
    after: str
    label: str
    tensors: tuple[TensorChange, ...]
    note: str = ""

    def modules(self) -> list[GroupChange]:
        """A group for each (layer, module)."""
        return self._grouped(lambda t: (t.layer, t.module))

    def layers(self) -> list[GroupChange]:
        """A group for each layer; what stands outside the layers is left out."""
        return [g for g in self._grouped(lambda t: (t.layer, "all")) if g.layer is not None]

    def total(self) -> GroupChange:
        """The whole model."""
        return self._grouped(lambda t: (None, "model"))[0]

    def _grouped(self, key: Any) -> list[GroupChange]:
        groups: dict[tuple[int | None, str], list[TensorChange]] = {}
        for tensor in self.tensors:
            groups.setdefault(key(tensor), []).append(tensor)
        return [
            GroupChange(
                layer=layer,
                module=module,
                elements=(elements := sum(t.elements for t in members)),
                norm=math.hypot(*(t.norm for t in members)),
                norm_before=math.hypot(*(t.norm_before for t in members)),
                unchanged=sum(t.unchanged * t.elements for t in members) / max(1, elements),
            )
            for (layer, module), members in groups.items()
        ]

    def record(self) -> dict[str, Any]:
        """Plain data: the model, its layers, its modules, and every tensor."""
        return {
            "before": self.before,
            "after": self.after,
            "label": self.label,
            "note": self.note,
            "total": _plain(self.total()),
            "layers": [_plain(group) for group in self.layers()],
            "modules": [_plain(group) for group in self.modules()],
            "tensors": [_plain(tensor) for tensor in self.tensors],
        }

    def rows(self) -> list[dict[str, Any]]:
        """A row for each module of each layer, with the largest change of an element in it."""
        rows = []
        for group in self.modules():
            members = [t for t in self.tensors if (t.layer, t.module) == (group.layer, group.module)]
            found = largest_changes(members, 1)
            places = ("largest_tensor", "largest_index", "largest_before", "largest_change")
            row: tuple[Any, ...] = (None,) * 4
            if found:
                tensor, element = found[0]
                row = (tensor, " ".join(map(str, element.index)), element.before, element.change)
            rows.append({"model": self.label, **_plain(group), **dict(zip(places, row, strict=True))})
        return rows


def largest_changes(tensors: Sequence[TensorChange], count: int) -> list[tuple[str, ElementChange]]:
    """The `count` elements of some tensors that changed most, with the tensor's name."""
    every = [(tensor.name, element) for tensor in tensors for element in tensor.largest]
    return sorted(every, key=lambda pair: -abs(pair[1].change))[:count]


def magnitude(
    before: str, after: str, *, largest: int = LARGEST, fields: tuple[str, str] = ("BEFORE", "AFTER")
) -> Magnitude:
    """Compare two checkpoints of one model.

    Args:
        before: θ_0: a model folder, a finished run, a checkpoint of a run, or the embedded model.
        after: θ_T.
        largest: how many of the largest changes of each tensor to keep.
        fields: what messages call the two.

    Raises:
        ConfigError: `largest` is below 1.
        ModelError: one is no model, or their architectures differ.
        NumericsError: a weight is not finite.
    """
    if largest < 1:
        raise ConfigError(f"--largest = {largest} must be at least 1.")
    old, new = Tensors(find_source(before, fields[0])), Tensors(find_source(after, fields[1]))
    names = common_names([old, new])
    changes = tuple(_tensor_change(name, old, new, largest) for name in names)
    return Magnitude(before=before, after=after, label=new.source.label, tensors=changes, note=types_note([old, new]))


def magnitudes(before: str, afters: Sequence[str], *, largest: int = LARGEST) -> list[Magnitude]:
    """`magnitude` of several models from one start, under labels that tell them apart."""
    found = [magnitude(before, after, largest=largest) for after in afters]
    labels = labels_of([find_source(path, "AFTER") for path in (before, *afters)])[1:]
    return [replace(one, label=label) for one, label in zip(found, labels, strict=True)]


def _tensor_change(name: str, old: Tensors, new: Tensors, largest: int) -> TensorChange:
    info, start = old.infos[name], 0
    squares = squares_before = 0.0
    same = 0
    top: list[tuple[float, int, float, float]] = []
    for before_E, after_E in zip(old.blocks(name), new.blocks(name), strict=True):
        wide = torch.promote_types(before_E.dtype, after_E.dtype)
        change_E = after_E.to(wide) - before_E.to(wide)
        squares += _sum_of_squares(change_E)
        squares_before += _sum_of_squares(before_E)
        same += len(change_E) - int(torch.count_nonzero(change_E))
        size_E = change_E.abs()
        if len(top) < largest or float(size_E.amax()) > top[-1][0]:  # most blocks hold none of the largest
            top = heapq.nlargest(largest, top + _largest(size_E, change_E, before_E, start, largest))
        start += len(change_E)
    if not math.isfinite(squares + squares_before):
        raise NumericsError(
            f"{name} holds numbers that are not finite in '{old.source.given}' or '{new.source.given}', so there is no norm. "
            "Name an earlier checkpoint."
        )
    layer, module = place_of(name)
    return TensorChange(
        name=name,
        layer=layer,
        module=module,
        elements=info.elements,
        norm=math.sqrt(squares),
        norm_before=math.sqrt(squares_before),
        unchanged=same / max(1, info.elements),
        largest=tuple(
            ElementChange(index=_unravelled(-place, info.shape), before=value, change=change)
            for _, place, value, change in top
        ),
    )


def _sum_of_squares(values_E: Tensor) -> float:
    return float(torch.linalg.vector_norm(values_E, dtype=torch.float64)) ** 2


def _largest(
    size_E: Tensor, change_E: Tensor, before_E: Tensor, start: int, count: int
) -> list[tuple[float, int, float, float]]:
    """(size, −place, value before, change) of the largest changes that are not zero."""
    sizes, places = size_E.topk(min(count, len(size_E)))
    return [
        (size, -(start + place), float(before_E[place]), float(change_E[place]))
        for size, place in zip(sizes.tolist(), places.tolist(), strict=True)
        if size > 0
    ]


def _unravelled(place: int, shape: Sequence[int]) -> tuple[int, ...]:
    index = []
    for size in reversed(shape):
        place, rest = divmod(place, size)
        index.append(rest)
    return tuple(reversed(index))


def _ratio(norm: float, before: float) -> float:
    if before == 0.0:
        return math.inf if norm > 0 else 0.0
    return norm / before


def _plain(change: TensorChange | GroupChange) -> dict[str, Any]:
    relative = change.relative
    return asdict(change) | {"relative": relative if math.isfinite(relative) else None}
