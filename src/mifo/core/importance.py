"""MIFO's importance map and the exact global top-k that freezes half of it (S0 §3.2, Algorithm 1).

    Δ = |θ_RL,end − θ_RL,start|      C̃ = α C + (1 − α) Δ      I = TopK(C̃, k·d)      C ← 1_I ⊙ C̃

Everything is fp32 whatever the parameters are. The mask is never stored: after the last step C is positive exactly on I,
because an element that never moved is never frozen (METHODS 7, resolution 11); `fill_ties` lifts that and then keeps the
zeros it froze apart.

Top-k is a radix selection over the bit patterns: non-negative floats order like their bits, so a histogram of the upper
16 of 31 bits finds the bin of the threshold and one of the lower 15 bits the threshold itself. No sort and no copy; over
shards only counts are summed. Ties at the threshold go to the earlier (tensor, flat index).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mifo.core.reduce import AllSum, single_rank
from mifo.errors import ConfigError, NumericsError

BLOCK = 1 << 22  # elements looked at at once: the histogram works in cache and needs no copy of the map
CACHE_BLOCK = 1 << 16  # elements that several passes over a few tensors find in a core's cache again
LOW_BITS = 15
INFINITY_BITS = 0x7F800000


@dataclass(frozen=True, slots=True)
class Shards:
    """Where this rank stands when tensors are split along their flat index: rank r holds the r-th piece of each.

    `all_sum` adds an int64 tensor up over ranks. One rank is the default.
    """

    rank: int = 0
    size: int = 1
    all_sum: AllSum = single_rank


ONE_SHARD = Shards()


@dataclass(frozen=True, slots=True)
class FreezeReport:
    """What one selection froze: counts over all ranks, tied weights once."""

    elements: int
    moved: int
    frozen: int
    threshold: float

    @property
    def fraction(self) -> float:
        """Frozen share of all trainable elements."""
        return self.frozen / max(1, self.elements)


def _bits(values: Tensor) -> Iterator[Tensor]:
    for block in values.detach().reshape(-1).split(BLOCK):
        yield block.view(torch.int32)


def _check_orderable(values: Sequence[Tensor]) -> None:
    for index, tensor in enumerate(values):
        assert tensor.dtype == torch.float32
        assert tensor.is_contiguous()
        if tensor.numel() == 0:
            continue
        low, high = (int(v) for v in torch.aminmax(tensor.detach().view(torch.int32)))
        if low < 0 or high >= INFINITY_BITS:
            raise NumericsError(
                f"top-k of the importance map: tensor {index} (shape {tuple(tensor.shape)}) holds a negative, NaN or infinite "
                "value. The weights diverged during RL: lower the learning rate or resume from an earlier checkpoint."
            )


def _descend(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bin in which the `wanted`-th largest value lies, and how many values lie in the bins above it."""
    above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(above, wanted))
    bin_index = len(counts) - 1 - place
    return bin_index, int(above[place - 1]) if place else 0


def top_k_threshold(values: Sequence[Tensor], k: int, shards: Shards = ONE_SHARD) -> tuple[int, int, int]:
    """Bit pattern of the k-th largest value over all tensors and shards, how many exceed it, and how many equal it.

    Args:
        values: non-negative finite fp32 tensors.
        k: 1 ≤ k ≤ number of elements over all shards.
        shards: this rank's place.
    """
    device = values[0].device
    high = torch.zeros(1 << (31 - LOW_BITS), dtype=torch.int64, device=device)
    for tensor in values:
        for bits in _bits(tensor):
            high += torch.bincount(bits >> LOW_BITS, minlength=len(high))
    upper, above = _descend(shards.all_sum(high), k)
    low = torch.zeros(1 << LOW_BITS, dtype=torch.int64, device=device)
    for tensor in values:
        for bits in _bits(tensor):
            low += _counts_within(bits, upper)
    low = shards.all_sum(low)
    lower, above_in_bin = _descend(low, k - above)
    return (upper << LOW_BITS) | lower, above + above_in_bin, int(low[lower])


def _counts_within(bits: Tensor, upper: int) -> Tensor:
    """Histogram of the lower bits of those values whose upper bits are `upper`: int64 [1 << LOW_BITS]."""
    size = 1 << LOW_BITS
    if bits.device.type == "cpu":  # others fall into a bin at either end: faster than to pick out those within
        places = (bits - (upper << LOW_BITS)).clamp_(-1, size).add_(1)
        return torch.bincount(places, minlength=size + 2)[1:-1]
    inside = bits[(bits >> LOW_BITS) == upper]
    return torch.bincount(inside & (size - 1), minlength=size)


def _ties_allowed(values: Sequence[Tensor], threshold: int, ties: int, shards: Shards) -> list[int]:
    """How many elements equal to the threshold each local tensor may keep, first tensor and lowest rank first."""
    local: list[int] = []
    for tensor in values:
        settled = shards.size == 1 and sum(local) >= ties  # the rest gets none, however many it has
        local.append(0 if settled else sum(int((bits == threshold).sum()) for bits in _bits(tensor)))
    table = torch.zeros(len(values), shards.size, dtype=torch.int64, device=values[0].device)
    table[:, shards.rank] = torch.tensor(local, dtype=torch.int64, device=table.device)
    flat = shards.all_sum(table).reshape(-1)
    before = (flat.cumsum(0) - flat).reshape(len(values), shards.size)[:, shards.rank]
    return [max(0, min(count, ties - int(b))) for count, b in zip(local, before, strict=True)]


def select_top_k(values: Sequence[Tensor], k: int, shards: Shards = ONE_SHARD) -> list[Tensor]:
    """Masks of the k largest elements over all tensors and shards; exact, deterministic under ties.

    Args:
        values: non-negative finite fp32 tensors, in the same order on every rank.
        k: elements to select over all ranks; 0 selects none.
        shards: this rank's place.

    Returns:
        One bool tensor for each of `values`.

    Raises:
        NumericsError: a value is negative, NaN or infinite.
    """
    _check_orderable(values)
    if k == 0 or not values:
        return [torch.zeros_like(v, dtype=torch.bool) for v in values]
    return list(_top_k_masks(values, *_threshold_and_quotas(values, k, shards)))


def _threshold_and_quotas(values: Sequence[Tensor], k: int, shards: Shards) -> tuple[int, list[int] | None]:
    """The threshold's bits, and how many ties each tensor keeps; None where all of them are kept, as is usual."""
    threshold, above, equal = top_k_threshold(values, k, shards)
    return threshold, None if above + equal == k else _ties_allowed(values, threshold, k - above, shards)


def _top_k_masks(values: Sequence[Tensor], threshold: int, quotas: Sequence[int] | None) -> Iterator[Tensor]:
    """One mask after the other, so that they need not all exist at once."""
    for index, tensor in enumerate(values):
        bits = tensor.view(torch.int32)
        if quotas is None:
            yield bits >= threshold
            continue
        mask = bits > threshold
        if quotas[index]:
            tied = (bits == threshold).reshape(-1).nonzero()[: quotas[index], 0]
            mask.view(-1)[tied] = True
        yield mask


def _keep_top(values: Sequence[Tensor], threshold: int, quotas: Sequence[int] | None) -> None:
    """Zero what is not among the k largest, in place; `threshold` is that of a positive value."""
    for index, tensor in enumerate(values):
        drop_ties = quotas is not None and quotas[index] == 0
        torch.threshold_(tensor, _as_float(threshold if drop_ties else threshold - 1), 0.0)  # keeps what is greater
        if quotas is not None and quotas[index]:
            tied = (tensor.view(torch.int32) == threshold).reshape(-1).nonzero()[quotas[index] :, 0]
            tensor.view(-1)[tied] = 0.0


def _count_positive(values: Tensor) -> int:
    """How many of the non-negative `values` are not zero; sums of signs, as `count_nonzero` is slow on the CPU."""
    if values.device.type != "cpu":
        return int(torch.count_nonzero(values))
    return sum(int(block.sign().sum()) for block in values.reshape(-1).split(CACHE_BLOCK))


def _as_float(bits: int) -> float:
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))


class ImportanceMap:
    """Which elements RL moved most, with a history over intervals.

    Call `begin_interval` where RL starts and `end_interval` where it ends; `masks()` then says what SFT must leave alone.
    Tied parameters count once. Works on the local tensors of a sharded model when `shards` says where they stand.

    Args:
        parameters: the trainable parameters.
        top: k, the share of all elements to freeze, in [0, 1].
        history: α, in [0, 1]; 0 keeps no history (the paper's MIFO†), 1 would never learn and is refused by the config.
        scope: "global" ranks all elements together, "tensor" takes the share of every tensor.
        fill_ties: freeze elements that never moved when fewer than k·d did.
        shards: this rank's place among ranks that hold pieces of each tensor.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        top: float = 0.5,
        history: float = 0.5,
        scope: Literal["global", "tensor"] = "global",
        fill_ties: bool = False,
        shards: Shards = ONE_SHARD,
    ) -> None:
        if not (0.0 <= top <= 1.0 and 0.0 <= history < 1.0) or scope not in ("global", "tensor"):
            raise ConfigError(
                f"ImportanceMap(top={top}, history={history}, scope={scope!r}): top is a share in [0, 1], history in [0, 1), "
                "scope 'global' or 'tensor'."
            )
        self.parameters = list(dict.fromkeys(p for p in parameters if p.requires_grad))
        self.top, self.history, self.scope, self.fill_ties, self.shards = top, history, scope, fill_ties, shards
        self.importance = [torch.zeros(p.shape, dtype=torch.float32, device=p.device) for p in self.parameters]
        self.start = [p.detach().clone(memory_format=torch.contiguous_format) for p in self.parameters]
        self._frozen_zeros: list[Tensor] | None = None

    @torch.no_grad()
    def begin_interval(self) -> None:
        """θ_RL,start ← θ."""
        for start, parameter in zip(self.start, self.parameters, strict=True):
            start.copy_(parameter)

    @torch.no_grad()
    def end_interval(self) -> FreezeReport:
        """Update the map from what moved since `begin_interval` and select the elements to freeze.

        The snapshot is overwritten with the parameters as the SFT phase finds them: what its freeze puts back.
        """
        for importance, start, parameter in zip(self.importance, self.start, self.parameters, strict=True):
            wide = torch.float64 if start.dtype == torch.float64 else torch.float32
            size = CACHE_BLOCK if start.device.type == "cpu" else BLOCK
            rows = (importance.view(-1), start.view(-1), parameter.detach().reshape(-1))
            for old, before, now in zip(*(row.split(size) for row in rows), strict=True):
                moved = (now.to(wide) - before.to(wide)).float().abs_()
                old.mul_(self.history).add_(moved, alpha=1.0 - self.history)
                before.copy_(now)
        groups = [[i] for i in range(len(self.importance))] if self.scope == "tensor" else [range(len(self.importance))]
        self._frozen_zeros = (
            [torch.zeros_like(c, dtype=torch.bool) for c in self.importance] if self.fill_ties else None
        )
        reports = [self._select(list(group)) for group in groups]
        return FreezeReport(
            elements=sum(r.elements for r in reports),
            moved=sum(r.moved for r in reports),
            frozen=sum(r.frozen for r in reports),
            threshold=min((r.threshold for r in reports if r.frozen), default=0.0),
        )

    def _select(self, indices: list[int]) -> FreezeReport:
        values = [self.importance[i] for i in indices]
        _check_orderable(values)
        local = torch.tensor([sum(v.numel() for v in values), sum(map(_count_positive, values))])
        elements, moved = (int(n) for n in self.shards.all_sum(local))
        wanted = math.floor(round(self.top * elements, 6))  # ⌊k·d⌋ of the real number: 0.57 · 100 is 57
        if moved <= wanted and not self.fill_ties:
            return FreezeReport(elements=elements, moved=moved, frozen=moved, threshold=0.0)
        if wanted == 0:
            for importance in values:
                importance.zero_()
            return FreezeReport(elements=elements, moved=moved, frozen=0, threshold=0.0)
        threshold, quotas = _threshold_and_quotas(values, wanted, self.shards)
        if self._frozen_zeros is None:
            _keep_top(values, threshold, quotas)
        else:
            for i, mask in zip(indices, _top_k_masks(values, threshold, quotas), strict=True):
                self._frozen_zeros[i] = mask & (self.importance[i] == 0)
                self.importance[i].mul_(mask)
        return FreezeReport(elements=elements, moved=moved, frozen=wanted, threshold=_as_float(threshold))

    def mask(self, index: int) -> Tensor:
        """M of one parameter: bool, True where SFT must not move it."""
        positive = self.importance[index] > 0
        return positive if self._frozen_zeros is None else positive | self._frozen_zeros[index]

    def frozen_bits(self, index: int) -> Tensor:
        """M of one parameter as int32: −1 (all bits) where SFT must not move it, 0 elsewhere; for `ElementFreeze`."""
        bits = self.importance[index].view(torch.int32).neg().bitwise_right_shift_(31)
        if self._frozen_zeros is not None:
            bits.bitwise_or_(self._frozen_zeros[index].to(torch.int32).neg_())
        return bits

    def masks(self) -> dict[nn.Parameter, Tensor]:
        """M of every parameter, all at once (one byte an element); `mask` makes one at a time."""
        return {p: self.mask(i) for i, p in enumerate(self.parameters)}

    def state_dict(self) -> dict[str, Any]:
        """Map, interval start and frozen zeros, in parameter order."""
        return {"importance": self.importance, "start": self.start, "frozen_zeros": self._frozen_zeros or []}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; shapes must match."""
        for name, mine in (("importance", self.importance), ("start", self.start)):
            for target, source in zip(mine, state[name], strict=True):
                target.copy_(source)
        zeros = state["frozen_zeros"]
        self._frozen_zeros = [z.clone() for z in zeros] if zeros else None
