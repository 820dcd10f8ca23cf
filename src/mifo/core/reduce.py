"""The only place in the project that divides a loss.

A stream's loss is  Σ_{i∈U} s_i Σ_t w_{i,t} f_{i,t},  where the scale s_i of a sequence is

    token      TOK      1 / Σ_{j∈U} |y_j|
    sequence   SEQ      1 / (|U| · |y_i|)      |U| counts sequences with at least one token
    constant   CONST_L  1 / (|U| · L)

U is the whole update: every micro-batch of every rank. The scales are made once, from counts that were summed over all
ranks, before the first micro-batch is seen; micro-batches then only add. So there is no mean to take of means, and a
micro-batch that goes missing changes the result instead of hiding in an average.

`published_scales` gives the sums of some published codes, which depend on their GPUs and micro-batches, for recipes that name
the code ([legacy]). They too are made once for the whole update, from micro-batches that are simulated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mifo.types import NormalizerName, PublishedBatches, PublishedSum

AllSum = Callable[[Tensor], Tensor]
"""Sums a small tensor over all ranks and returns it; the identity where there is one rank."""


def single_rank(counts: Tensor) -> Tensor:
    """The all-reduce of a world of one."""
    return counts


@dataclass(frozen=True, slots=True)
class Totals:
    """What an update holds over all ranks: response tokens and non-empty sequences of one stream."""

    tokens: int
    sequences: int


def update_totals(lengths: Sequence[Sequence[int]], all_sum: AllSum = single_rank) -> list[Totals]:
    """Totals of each stream of an update.

    Args:
        lengths: for each stream the token counts of its sequences on this rank. A rank with no sequences passes an
            empty list and still takes part.
        all_sum: adds an int64 tensor [streams, 2] up over ranks.
    """
    counts = torch.tensor(
        [[sum(stream), sum(length > 0 for length in stream)] for stream in lengths], dtype=torch.int64
    ).reshape(len(lengths), 2)
    return [Totals(tokens=int(tokens), sequences=int(sequences)) for tokens, sequences in all_sum(counts)]


def sequence_scale(
    length: int, totals: Totals, normalizer: NormalizerName, constant_tokens: int | None = None
) -> float:
    """The factor s_i of one sequence's summed token losses; 0 for a sequence without tokens.

    Args:
        length: tokens of this sequence that the stream counts.
        totals: of the whole update.
        normalizer: token, sequence or constant.
        constant_tokens: L of the constant normaliser.
    """
    if length == 0:
        return 0.0
    if normalizer == "token":
        return 1.0 / totals.tokens
    if normalizer == "sequence":
        return 1.0 / (totals.sequences * length)
    assert constant_tokens is not None
    return 1.0 / (totals.sequences * constant_tokens)


def published_scales(
    counted: Sequence[int], lengths: Sequence[int], rule: PublishedSum, constant_tokens: int | None
) -> list[float]:
    """The factors of all sequences of an update as a published code has them; 0 where the stream sees none.

    constant    1 / (gpus · L)      Σ/L of every micro-batch, the gradient averaged over GPUs
    sum         1 / (gpus · n_j)    the token mean of every micro-batch j, added up over micro-batches
    sequences   B_j / (B · n_j)     the token means, weighted by the share that j has of the stream's B sequences

    Args:
        counted: tokens of each sequence that the stream counts.
        lengths: its prompt and response tokens, by which micro-batches fill.
        rule: which of the three, and the code's GPUs and micro-batches.
        constant_tokens: L of "constant".
    """
    if rule.kind == "constant":
        assert constant_tokens is not None
        return [1.0 / (rule.gpus * constant_tokens) if tokens else 0.0 for tokens in counted]
    scales, seen = [0.0] * len(counted), sum(tokens > 0 for tokens in counted)
    for batch in published_micro_batches(lengths, rule):
        members = [i for i in batch if counted[i]]
        tokens = sum(counted[i] for i in members)
        for i in members:
            scales[i] = 1.0 / (rule.gpus * tokens) if rule.kind == "sum" else len(members) / (seen * tokens)
    return scales


def published_micro_batches(lengths: Sequence[int], rule: PublishedBatches) -> list[list[int]]:
    """The sequences of each micro-batch: an even share for each GPU, in order, cut where the next one would not fit."""
    share = max(1, -(-len(lengths) // rule.gpus))
    batches: list[list[int]] = []
    for start in range(0, len(lengths), share):
        batch: list[int] = []
        for i in range(start, min(start + share, len(lengths))):
            if batch and sum(lengths[k] for k in batch) + lengths[i] > rule.tokens:
                batches.append(batch)
                batch = []
            batch.append(i)
        batches.append(batch)
    return batches


def weighted_sum(values_T: Tensor, scale_T: Tensor) -> Tensor:
    """Σ_t s_t f_t of one micro-batch: what is added to the update's loss, with nothing further to divide.

    Rows with scale 0 add exactly nothing, whatever their value (also if it is not finite).
    """
    assert values_T.shape == scale_T.shape
    return torch.where(scale_T != 0, values_T * scale_T, torch.zeros_like(values_T)).sum()
