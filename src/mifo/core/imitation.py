"""Losses of imitation: what one demonstrated token is worth.

Elementwise like `core.losses`: tensors in, one value a token out, nothing divided; w_t is the sequence's weight, p_t the
probability of the demonstrated token, sg a constant to the gradient. Weights are made in fp32 from the same logits as the
log-probs (fp64 where those are). PSFT is `PolicyGradient` with advantage 1 and no lower bound.

Legend: T response tokens of one micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mifo.types import TokenStats

EAFT_TOP = 20  # logits that EAFT takes the entropy of
EAFT_SCALE = 3.0  # nats; the authors' code writes 3 for ln 20


@dataclass(frozen=True, slots=True)
class DynamicFineTuning:
    """−w_t sg(p_t) log p_t: DFT, whose gradient is that of −w_t p_t."""

    def __call__(self, stats: TokenStats) -> Tensor:
        return -stats.weight_T * stats.logp_T.detach().exp() * stats.logp_T


@dataclass(frozen=True, slots=True)
class ChordPhi:
    """−w_t sg(p_t (1 − p_t)) log p_t: CHORD's φ, least for tokens that are certain either way."""

    def __call__(self, stats: TokenStats) -> Tensor:
        logp_T = stats.logp_T.detach()
        return stats.weight_T * logp_T.exp() * torch.expm1(logp_T) * stats.logp_T


@dataclass(frozen=True, slots=True)
class EntropyAdaptive:
    """−w_t sg((H20_t/3)^α) log p_t: EAFT. `vocabulary_T` holds H20, the entropy of the 20 largest logits among themselves."""

    alpha: float = 1.0

    def __call__(self, stats: TokenStats) -> Tensor:
        assert stats.vocabulary_T is not None
        weight_T = (stats.vocabulary_T.detach() / EAFT_SCALE) ** self.alpha
        return -stats.weight_T * weight_T * stats.logp_T


@dataclass(frozen=True, slots=True)
class AnchoredFineTuning:
    """w_t (−sg(p_t) log p_t + λ KL(π_ref‖π_θ)): ASFT. `vocabulary_T` holds the divergence; λ = 0 is DFT."""

    kl: float = 0.05

    def __call__(self, stats: TokenStats) -> Tensor:
        assert stats.vocabulary_T is not None
        return DynamicFineTuning()(stats) + stats.weight_T * self.kl * stats.vocabulary_T


@dataclass(frozen=True, slots=True)
class GameEntropy:
    """w_t Σ_v sg(q_v w_v)(log π_v − log π_y): GEM. `vocabulary_T` holds the sum."""

    def __call__(self, stats: TokenStats) -> Tensor:
        assert stats.vocabulary_T is not None
        return stats.weight_T * stats.vocabulary_T
