"""Exact choice of the highest-entropy tokens of each response (S0 §3.1).

Keeps K_i = ⌈ρ·|s_i|⌉ tokens of response i. The paper's threshold form "H ≥ τ" keeps more than that when entropies tie;
here the earlier position wins, so the count is exact and the choice does not depend on how tokens are batched.

Legend: T response tokens of one micro-batch, grouped by sequence.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mifo.core.topk import ONE_SHARD, Shards, select_top_k
from mifo.errors import ConfigError, NumericsError


def kept_count(length: int, fraction: float) -> int:
    """⌈fraction·length⌉, immune to how fractions are represented (⌈0.2·5⌉ is 1, not 2); at least 1 unless nothing is wanted."""
    return min(length, max(int(fraction > 0), math.ceil(round(fraction * length, 9))))


def top_entropy_tokens(entropy_T: Tensor, sequence_T: Tensor, fraction: float) -> Tensor:
    """Mask of the ⌈ρ·|s|⌉ highest-entropy tokens of every sequence.

    Args:
        entropy_T: entropies in nats, [T]; detached before use.
        sequence_T: which sequence each token belongs to, int64 [T]; tokens of a sequence stand in their order.
        fraction: ρ in (0, 1].

    Returns:
        bool [T].

    Raises:
        NumericsError: an entropy is NaN or infinite, so there is no order to select by.
    """
    if not 0.0 < fraction <= 1.0:
        raise ConfigError(f"selection by entropy: fraction = {fraction} must be more than 0 and at most 1.")
    values_T = entropy_T.detach()
    if not bool(torch.isfinite(values_T).all()):
        bad = int((~torch.isfinite(values_T)).sum())
        raise NumericsError(
            f"selection by entropy: {bad} of {values_T.numel()} entropies are not finite, so there is no order. "
            "The logits overflowed: lower the learning rate or load an earlier checkpoint."
        )
    if fraction == 1.0 or values_T.numel() == 0:
        return torch.ones_like(values_T, dtype=torch.bool)
    # Two stable sorts: by falling entropy, then by sequence. The rank inside a sequence is the place after both.
    by_entropy = torch.argsort(values_T, descending=True, stable=True)
    order = by_entropy[torch.argsort(sequence_T[by_entropy], stable=True)]
    ids, lengths = torch.unique_consecutive(sequence_T[order], return_counts=True)
    starts = torch.cumsum(lengths, 0) - lengths
    rank_T = torch.arange(len(order), device=order.device) - torch.repeat_interleave(starts, lengths)
    keep_counts = torch.tensor([kept_count(int(n), fraction) for n in lengths], device=order.device)
    assert len(ids) == len(keep_counts)
    kept_T = torch.zeros_like(values_T, dtype=torch.bool)
    kept_T[order] = rank_T < torch.repeat_interleave(keep_counts, lengths)
    return kept_T


def top_entropy_of_all(entropy_T: Tensor, fraction: float, shards: Shards = ONE_SHARD) -> Tensor:
    """Mask of the ⌈ρ·n⌉ highest-entropy tokens among all n that the ranks hold together, ties by rank and position.

    Args:
        entropy_T: this rank's entropies in nats, finite, fp32 [T]; rounding below 0 counts as 0.
        fraction: ρ in (0, 1].
        shards: this rank's place.

    Returns:
        bool [T].
    """
    total = int(shards.all_sum(torch.tensor([len(entropy_T)]))[0])
    return select_top_k([entropy_T.detach().clamp(min=0.0)], kept_count(total, fraction), shards)[0]


def top_entropy_weights(logits_BTV: Tensor, response_BT: Tensor, fraction: float) -> Tensor:
    """The selection for a padded batch of somebody else's loop: 1.0 on the tokens to learn, 0.0 elsewhere.

    Args:
        logits_BTV: logits of the positions that predict, [B, T, V]; used without gradient.
        response_BT: bool [B, T], True where the position predicts a response token.
        fraction: ρ in (0, 1].

    Returns:
        [B, T] in the dtype of the logits. Multiply token losses with it and divide by the number of response tokens of
        the whole update, not by the number kept.

    Raises:
        NumericsError: an entropy of a response position is not finite.
    """
    with torch.no_grad():
        sequence_T, place_T = response_BT.nonzero(as_tuple=True)
        entropy_T = torch.cat(
            [_entropy(rows) for rows in logits_BTV[sequence_T, place_T].split(1024)] or [sequence_T.float()]
        )
        weights_BT = torch.zeros(response_BT.shape, dtype=logits_BTV.dtype, device=logits_BTV.device)
        weights_BT[sequence_T, place_T] = top_entropy_tokens(entropy_T, sequence_T, fraction).to(logits_BTV.dtype)
    return weights_BT


def _entropy(logits_TV: Tensor) -> Tensor:
    logp_TV = torch.log_softmax(logits_TV.float(), -1)
    return -torch.where(logp_TV > float("-inf"), logp_TV.exp() * logp_TV, 0.0).sum(-1)
