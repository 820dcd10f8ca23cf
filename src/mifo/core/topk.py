"""Exact top-k over many tensors and ranks, by radix selection.

Non-negative floats order like their bits, so a histogram of the upper 16 of 31 bits finds the bin of the threshold and one of
the lower 15 bits the threshold itself. On the CPU, where histograms are slow, a sample first says between which bins the
threshold lies: what is above is only counted, and the few elements in between are picked out. If the sample misled, the
histograms take everything. No sort; over ranks only counts are summed. Ties at the threshold go to the earlier
(tensor, flat index).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mifo.core.blocks import blocks
from mifo.core.reduce import AllSum, single_rank
from mifo.errors import NumericsError

LOW_BITS = 15
BINS = 1 << (31 - LOW_BITS)
INFINITY_BITS = 0x7F800000
SAMPLE_STRIDE = 499  # a prime, so that it meets every column of a matrix
SAMPLED_FROM = 1 << 20  # elements from which on a sample is worth its time


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
class TopK:
    """The k largest: all that are at least `threshold`, but for those at the flat positions `dropped` of each tensor."""

    threshold: float
    dropped: list[Tensor]


@dataclass(frozen=True, slots=True)
class _Near:
    """The local elements close to the threshold: their bits and flat positions in each tensor; and all that is above them."""

    bits: list[Tensor]
    positions: list[Tensor]
    above: int


def find_top_k(values: Sequence[Tensor], k: int, shards: Shards = ONE_SHARD) -> TopK:
    """The k largest elements over all tensors and shards.

    Args:
        values: non-negative finite contiguous fp32 tensors, in the same order on every rank.
        k: 1 ≤ k ≤ number of elements over all shards.
        shards: this rank's place.
    """
    bits = [tensor.detach().view(torch.int32).view(-1) for tensor in values]
    near = _near_threshold(bits, k, shards) if bits[0].device.type == "cpu" else None
    if near is None:
        threshold, above, equal = _radix(bits, k, shards)
    else:
        threshold, above, equal = _radix(near.bits, k - near.above, shards)
        above += near.above
    dropped = [torch.empty(0, dtype=torch.int64, device=row.device) for row in bits]
    if above + equal > k:
        if near is None:
            tied = [(row == threshold).nonzero()[:, 0] for row in bits]
        else:
            tied = [rows[row == threshold] for row, rows in zip(near.bits, near.positions, strict=True)]
        quotas = _tie_quotas([len(rows) for rows in tied], k - above, shards, bits[0].device)
        dropped = [rows[quota:] for rows, quota in zip(tied, quotas, strict=True)]
    return TopK(float(torch.tensor(threshold, dtype=torch.int32).view(torch.float32)), dropped)


def select_top_k(values: Sequence[Tensor], k: int, shards: Shards = ONE_SHARD) -> list[Tensor]:
    """Masks of the k largest elements over all tensors and shards; exact, deterministic under ties.

    Args:
        values: non-negative finite contiguous fp32 tensors, in the same order on every rank.
        k: elements to select over all ranks; 0 selects none.
        shards: this rank's place.

    Returns:
        One bool tensor for each of `values`.

    Raises:
        NumericsError: a value is negative, NaN or infinite.
    """
    for index, tensor in enumerate(values):
        for (block,) in blocks(tensor):
            check_orderable(block, index)
    if k == 0 or not values:
        return [torch.zeros_like(v, dtype=torch.bool) for v in values]
    top = find_top_k(values, k, shards)
    masks = [tensor >= top.threshold for tensor in values]
    for mask, dropped in zip(masks, top.dropped, strict=True):
        mask.view(-1)[dropped] = False
    return masks


def check_orderable(block: Tensor, index: int) -> None:
    """Refuse values of tensor `index` whose bits do not order them; a sign bit, like a full exponent, makes a large unsigned.

    Raises:
        NumericsError: one is negative, NaN or infinite.
    """
    assert block.dtype == torch.float32
    if block.numel() == 0:
        return
    bits = block.view(torch.int32)
    if block.device.type == "cpu":
        orderable = int(bits.numpy().view(np.uint32).max()) < INFINITY_BITS
    else:
        low, high = torch.aminmax(bits)
        orderable = int(low) >= 0 and int(high) < INFINITY_BITS
    if not orderable:
        raise NumericsError(
            f"top-k of the importance map: tensor {index} holds a negative, NaN or infinite value. The weights diverged during "
            "RL: lower the learning rate or resume from an earlier checkpoint."
        )


def _radix(values: Sequence[Tensor], k: int, shards: Shards) -> tuple[int, int, int]:
    """Bits of the k-th largest value over all tensors and shards, how many exceed it, and how many equal it."""
    device = values[0].device
    high = torch.zeros(BINS, dtype=torch.int64, device=device)
    for tensor in values:
        for (bits,) in blocks(tensor):
            high += torch.bincount(bits >> LOW_BITS, minlength=BINS)
    upper, above = _descend(shards.all_sum(high), k)
    low = torch.zeros(1 << LOW_BITS, dtype=torch.int64, device=device)
    for tensor in values:
        for (bits,) in blocks(tensor):
            inside = bits[(bits >> LOW_BITS) == upper]
            low += torch.bincount(inside & (len(low) - 1), minlength=len(low))
    low = shards.all_sum(low)
    lower, above_in_bin = _descend(low, k - above)
    return (upper << LOW_BITS) | lower, above + above_in_bin, int(low[lower])


def _descend(counts: Tensor, wanted: int) -> tuple[int, int]:
    """The bin in which the `wanted`-th largest value lies, and how many values lie in the bins above it."""
    above = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(above, wanted))
    bin_index = len(counts) - 1 - place
    return bin_index, int(above[place - 1]) if place else 0


def _near_threshold(bits: Sequence[Tensor], k: int, shards: Shards) -> _Near | None:
    """What lies in the bins around the k-th largest; None where there are too few elements to sample, or where the sample
    misled and the k-th largest lies elsewhere."""
    bracket = _bracket(bits, k, shards)
    if bracket is None:
        return None
    above = 0
    near: list[Tensor] = []
    positions: list[Tensor] = []
    for tensor in bits:
        start, places = 0, [np.empty(0, dtype=np.int64)]
        for (block,) in blocks(tensor):
            values = block.numpy()
            higher = values >= bracket[1]
            above += int(np.count_nonzero(higher))
            places.append(np.flatnonzero((values >= bracket[0]) ^ higher) + start)
            start += len(values)
        positions.append(torch.from_numpy(np.concatenate(places)))
        near.append(tensor[positions[-1]])
    local = torch.tensor([above, sum(map(len, near))])
    total_above, total_near = (int(count) for count in shards.all_sum(local))
    return _Near(near, positions, total_above) if total_above < k <= total_above + total_near else None


def _bracket(bits: Sequence[Tensor], k: int, shards: Shards) -> tuple[int, int] | None:
    """Bits between which a sample puts the k-th largest, with six standard deviations to spare; the upper one exclusive."""
    counts = torch.zeros(BINS + 1, dtype=torch.int64)
    counts[BINS] = sum(tensor.numel() for tensor in bits)
    for tensor in bits:
        counts[:BINS] += torch.bincount(tensor[::SAMPLE_STRIDE] >> LOW_BITS, minlength=BINS)
    counts = shards.all_sum(counts)
    elements, sampled = int(counts[BINS]), int(counts[:BINS].sum())
    if elements < SAMPLED_FROM:
        return None
    share = k / elements
    place, slack = share * sampled, 6 * math.sqrt(share * (1 - share) * sampled) + 6
    first, last = math.floor(place - slack), math.ceil(place + slack)  # ranks in the sample, from the largest
    low = _descend(counts[:BINS], last)[0] << LOW_BITS if last <= sampled else 0
    high = (_descend(counts[:BINS], first)[0] + 1) << LOW_BITS if first >= 1 else INFINITY_BITS
    return low, high


def _tie_quotas(local: Sequence[int], ties: int, shards: Shards, device: torch.device) -> list[int]:
    """How many of its `local` elements equal to the threshold each tensor may keep, first tensor and lowest rank first."""
    table = torch.zeros(len(local), shards.size, dtype=torch.int64, device=device)
    table[:, shards.rank] = torch.tensor(local, dtype=torch.int64, device=device)
    flat = shards.all_sum(table).reshape(-1)
    before = (flat.cumsum(0) - flat).reshape(len(local), shards.size)[:, shards.rank].tolist()
    return [max(0, min(count, ties - earlier)) for count, earlier in zip(local, before, strict=True)]
