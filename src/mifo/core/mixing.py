"""Per-token values and schedules of the methods that learn from rollouts and demonstrations at once.

As in `core.losses`: tensors in, one value a token out, nothing divided; weight_T is an advantage or 1.

Legend: T response tokens of one micro-batch, S its sequences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from mifo.core.losses import CrossEntropy
from mifo.types import TokenLoss, TokenStats


@dataclass(frozen=True, slots=True)
class OffPolicy:
    """−A f(p) of a demonstration's tokens, p = π_θ(y_t) the current probability: LUFFY's off-policy objective.

    The behaviour policy is taken to be 1 on the demonstration, so p is the importance ratio, unclipped. f(p) = p/(p+γ)
    shapes it: the gradient is A·γp/(p+γ)²·∇log p, largest at p = γ, so tokens that the policy finds unlikely are still learned.
    `gamma` of None is f(p) = p (SRFT).
    """

    gamma: float | None = 0.1

    def __call__(self, stats: TokenStats) -> Tensor:
        probability_T = torch.exp(stats.logp_T)
        if self.gamma is None:
            return -stats.weight_T * probability_T
        return -stats.weight_T * probability_T / (probability_T + self.gamma)


@dataclass(frozen=True, slots=True)
class EntropyWeighted:
    """c·e^{±H} times a loss, the factor a constant to the gradient: SRFT's weights.

    `scope` "sequence" takes H as the mean entropy of the response (SRFT), "token" that of each token. `loss` is −w log π(y_t).
    """

    scale: float
    sign: Literal["minus", "plus"]
    scope: Literal["sequence", "token"] = "sequence"
    loss: TokenLoss = field(default_factory=CrossEntropy)

    def __call__(self, stats: TokenStats) -> Tensor:
        entropy_T = stats.entropy_T.detach()
        if self.scope == "sequence":
            entropy_T = sequence_means(entropy_T, stats.sequence_T)
        factor_T = self.scale * torch.exp(entropy_T if self.sign == "plus" else -entropy_T)
        return factor_T * self.loss(stats)


def sequence_means(values_T: Tensor, sequence_T: Tensor) -> Tensor:
    """Every token's value replaced by the mean over its sequence, [T]; a micro-batch holds sequences whole."""
    count = int(sequence_T.max()) + 1 if len(sequence_T) else 0
    sums_S = values_T.new_zeros(count).index_add(0, sequence_T, values_T)
    lengths_S = values_T.new_zeros(count).index_add(0, sequence_T, torch.ones_like(values_T))
    return (sums_S / lengths_S)[sequence_T]


def warmup_cosine(step: int, *, warmup: int, decay: int, peak: float, valley: float) -> float:
    """CHORD's μ_t: linear from 0 to the peak over `warmup` steps, cosine to the valley over `decay`, then the valley."""
    if step < warmup:
        return peak * step / warmup
    if step >= warmup + decay:
        return valley
    return valley + (peak - valley) * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / decay))
