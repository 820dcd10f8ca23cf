"""Per-token values of the streams of an update: tensors in, one value a token out, nothing divided.

Each loss is a small frozen dataclass (its settings) that is called with `TokenStats`. Signs are those of a loss: lower
is better. Sources: PPO's clipped objective, DAPO's separate clip ranges, GSPO's ratio of a response, CISPO's
clipped weight, dual clip (verl), truncated importance weights (Ionides 2008; Yao et al. 2025). Imitation: `core.imitation`.

Legend: T response tokens of one micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mifo.types import TokenStats

GREATEST_LOG_RATIO = 10.0  # of a response; verl's bound


def importance_ratio(stats: TokenStats) -> Tensor:
    """r_t = π_θ / π_old, [T]. Without `old_logp_T` the old policy is the current one: exactly 1, with its gradient."""
    old_T = stats.logp_T.detach() if stats.old_logp_T is None else stats.old_logp_T
    return torch.exp(stats.logp_T - old_T)


def sequence_ratio(stats: TokenStats) -> Tensor:
    """s_i π_θ / sg(π_θ), [T], with s_i = exp((1/|y_i|) Σ_t log r_t) a constant: GSPO's ratio, with each token's own gradient.

    log s_i is at most 10, and a response beyond that has no gradient (verl).
    A micro-batch holds responses whole, so the mean is that of the response.
    """
    now_T = stats.logp_T.detach()
    gap_T = torch.zeros_like(now_T) if stats.old_logp_T is None else now_T - stats.old_logp_T
    ids_S, place_T = stats.sequence_T.unique(return_inverse=True)
    member_ST = ids_S[:, None] == stats.sequence_T  # summed in a fixed order, unlike index_add on a GPU
    mean_S = (member_ST * gap_T).sum(1) / member_ST.sum(1)
    return torch.exp((mean_S[place_T] + stats.logp_T - now_T).clamp(max=GREATEST_LOG_RATIO))


def truncated_importance(stats: TokenStats, cap: float) -> Tensor:
    """w_t = min(π_old(y_t) / π_sampler(y_t), C), [T], a constant to the gradient.

    The rollouts come from the engine's distribution, not from π_old: another arithmetic, or other weights. Weighing each token
    by the ratio makes the token's gradient that of π_old in expectation; the cap bounds its variance. Truncated importance
    sampling is Ionides (2008), "Truncated Importance Sampling"; its use between sampler and trainer, token by token in front
    of PPO's objective, is Yao et al. (2025), "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training".
    It corrects the distribution of single tokens, not of the prefixes they follow.
    """
    assert stats.sampler_logp_T is not None
    old_T = stats.logp_T if stats.old_logp_T is None else stats.old_logp_T
    return torch.exp(old_T.detach() - stats.sampler_logp_T).clamp(max=cap)


@dataclass(frozen=True, slots=True)
class PolicyGradient:
    """−ψ(r, A), ψ = min(rA, clip(r, 1−ε_low, 1+ε_high) A); weight_T is the advantage A; r is a token's or its response's.

    With `clip` "weight" it is −sg(clip(r, 1−ε_low, 1+ε_high)) A log π instead (CISPO): no token loses its gradient.

    `clip_low` and `clip_high` of None run unclipped (LUFFY, ReLIFT). `dual_clip` c bounds the loss of a bad token whose
    ratio exploded: for A < 0 the objective is max(ψ, cA). `importance_cap` C multiplies each token's value by
    min(π_old/π_sampler, C), see `truncated_importance`.
    """

    clip_low: float | None = 0.2
    clip_high: float | None = 0.2
    dual_clip: float | None = None
    importance_cap: float | None = None
    ratio: Literal["token", "sequence"] = "token"
    clip: Literal["objective", "weight"] = "objective"

    def __call__(self, stats: TokenStats) -> Tensor:
        ratio_T, advantage_T = self._ratio(stats), stats.weight_T
        low = 0.0 if self.clip_low is None else 1.0 - self.clip_low
        high = float("inf") if self.clip_high is None else 1.0 + self.clip_high
        clipped_T = ratio_T.clamp(low, high)
        if self.clip == "weight":
            objective_T = clipped_T.detach() * advantage_T * stats.logp_T
        else:
            objective_T = torch.minimum(ratio_T * advantage_T, clipped_T * advantage_T)
        if self.dual_clip is not None:
            floor_T = self.dual_clip * advantage_T
            objective_T = torch.where(advantage_T < 0, torch.maximum(objective_T, floor_T), objective_T)
        if self.importance_cap is not None:
            objective_T = objective_T * truncated_importance(stats, self.importance_cap)
        return -objective_T

    def _ratio(self, stats: TokenStats) -> Tensor:
        return sequence_ratio(stats) if self.ratio == "sequence" else importance_ratio(stats)

    def clipped(self, stats: TokenStats) -> Tensor:
        """Which tokens the clip changes, bool [T]: it silences them, or bounds their weight."""
        with torch.no_grad():
            ratio_T, advantage_T = self._ratio(stats), stats.weight_T
            high = (
                torch.zeros_like(ratio_T, dtype=torch.bool) if self.clip_high is None else ratio_T > 1 + self.clip_high
            )
            low = torch.zeros_like(ratio_T, dtype=torch.bool) if self.clip_low is None else ratio_T < 1 - self.clip_low
            if self.clip == "weight":
                return (high | low) & (advantage_T != 0)
            return (high & (advantage_T > 0)) | (low & (advantage_T < 0))


@dataclass(frozen=True, slots=True)
class CrossEntropy:
    """−w_t log π(y_t): imitation (S0 Eq. 2)."""

    def __call__(self, stats: TokenStats) -> Tensor:
        return -stats.weight_T * stats.logp_T


@dataclass(frozen=True, slots=True)
class KlToReference:
    """w_t·k3 with k3 = e^d − d − 1, d = log π_ref − log π_θ: unbiased, non-negative estimate of KL(π_θ‖π_ref)."""

    def __call__(self, stats: TokenStats) -> Tensor:
        assert stats.ref_logp_T is not None
        gap_T = stats.ref_logp_T - stats.logp_T
        return stats.weight_T * (torch.expm1(gap_T) - gap_T)


@dataclass(frozen=True, slots=True)
class EntropyBonus:
    """−w_t H_t: a positive coefficient keeps the distribution wide."""

    def __call__(self, stats: TokenStats) -> Tensor:
        return -stats.weight_T * stats.entropy_T
