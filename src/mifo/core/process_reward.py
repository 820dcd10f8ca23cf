"""PRIME: process rewards from a model that was only ever told whether responses are right.

    q_t = log π_φ(y_t) − log π_ref(y_t)        the reward of token t
    L   = BCE(σ(β Σ_t q_t), correct)           how φ is trained, mean over responses

The advantage adds leave-one-out advantages of outcome and process, each summed to the end of the response, and whitens:

    A_t = whiten( γ^{T−1−t} (R − mean of the others' R)  +  c Σ_{k≥t} γ^{k−t} (q_k − b) )

Source: Cui et al. 2025 and `PRIME-RL/PRIME`. b is the mean over the group's other responses of their token means; the authors'
code takes N/(N − 1) q_k − Σ_j q̄_j/(N − 1) instead, which is the same for one number a response and not for several ("scaled").

Legend: T tokens of one response, or response tokens of a micro-batch; N responses of a group; S sequences of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from mifo.core.advantages import step_advantages
from mifo.core.critic import whitened_tokens
from mifo.types import TokenStats

NORM_FLOOR = 1e-6  # added to the greatest sum, as the authors' code does

DenseBaseline = Literal["leave_one_out", "scaled"]
Dense = Sequence[Sequence[Sequence[float]]]  # of each token of each response of each group


@dataclass(frozen=True, slots=True)
class OutcomeCrossEntropy:
    """BCE(σ(β Σ_t q_t), label), weight_T times, as the value of every token of its response.

    `target_T` holds the label, 1 or 0. With the normaliser "sequence" the sum over a response's tokens is its BCE over the number
    of responses. A micro-batch holds responses whole, so the sum is that of the response.
    """

    beta: float = 0.05

    def __call__(self, stats: TokenStats) -> Tensor:
        assert stats.ref_logp_T is not None
        assert stats.target_T is not None
        ids_S, place_T = stats.sequence_T.unique(return_inverse=True)
        member_ST = ids_S[:, None] == stats.sequence_T  # summed in a fixed order, unlike index_add on a GPU
        logit_S = self.beta * (member_ST * (stats.logp_T - stats.ref_logp_T)).sum(1)
        loss_T = F.binary_cross_entropy_with_logits(logit_S[place_T], stats.target_T, reduction="none")
        return stats.weight_T * loss_T


def reverse_sums(values_T: Sequence[float], discount: float) -> list[float]:
    """Σ_{k≥t} γ^{k−t} v_k of one response, [T]."""
    sums: list[float] = []
    later = 0.0
    for value in reversed(values_T):
        later = value + discount * later
        sums.append(later)
    return sums[::-1]


def over_greatest_sum(dense: Dense) -> list[list[list[float]]]:
    """Every q divided by the greatest |Σ_{k≥t} q_k| of the step plus 1e-6: β and the size of q then do not matter.

    The authors' code takes the greatest of a rank's part of the batch.
    """
    greatest = max((abs(s) for group in dense for row in group for s in reverse_sums(row, 1.0)), default=0.0)
    return [[[q / (greatest + NORM_FLOOR) for q in row] for row in group] for group in dense]


def centred_dense(group_N: Sequence[Sequence[float]], baseline: DenseBaseline) -> list[list[float]]:
    """The process rewards of one group less their baseline, per token.

    Args:
        group_N: q of each token of each response, at least two responses.
        baseline: "leave_one_out" or "scaled", see the module.
    """
    means = [sum(row) / len(row) if row else 0.0 for row in group_N]
    total, others = sum(means), len(group_N) - 1
    if baseline == "scaled":
        scale = len(group_N) / others
        return [[scale * q - total / others for q in row] for row in group_N]
    return [[q - (total - mean) / others for q in row] for row, mean in zip(group_N, means, strict=True)]


def prime_advantages(
    rewards: Sequence[Sequence[float]],
    dense: Dense,
    *,
    dense_coefficient: float,
    baseline: DenseBaseline,
    normalise: bool,
    discount: float,
    whiten: bool,
) -> list[list[tuple[float, ...]]]:
    """Advantages of all tokens of a step, group by group.

    Args:
        rewards: of each response of each group.
        dense: q of the same responses' tokens.
        dense_coefficient: c.
        baseline: of the process rewards.
        normalise: divide q by the step's greatest sum first.
        discount: γ.
        whiten: over all tokens of the step.
    """
    if normalise:
        dense = over_greatest_sum(dense)
    lengths = [[len(row) for row in group] for group in dense]
    outcomes = step_advantages(rewards, lengths, "rloo")
    rows = [
        _added(outcome, reverse_sums(row, discount), dense_coefficient, discount)
        for group, advantages in zip(dense, outcomes, strict=True)
        for outcome, row in zip(advantages, centred_dense(group, baseline), strict=True)
    ]
    found = iter(whitened_tokens(rows) if whiten else [tuple(row) for row in rows])
    return [[next(found) for _ in group] for group in dense]


def _added(outcome: float, dense_T: Sequence[float], coefficient: float, discount: float) -> list[float]:
    last = len(dense_T) - 1
    return [discount ** (last - t) * outcome + coefficient * value for t, value in enumerate(dense_T)]
