"""Advantages: rewards of the rollouts of a step in, one advantage a rollout out; and what shapes a reward.

Legend: G rollouts of one group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

STD_FLOOR = 1e-6  # added to the group's standard deviation, as verl does
VARIANCE_FLOOR = 1e-8  # added to the variance of a whole step, as verl does

Estimator = Literal["group", "rloo", "reinforce", "reinforce_baseline"]
HybridForm = Literal["shared", "dr_grpo_prefix", "dr_grpo_prefix_v2"]


def step_advantages(
    rewards: Sequence[Sequence[float]],
    lengths: Sequence[Sequence[int]],
    estimator: Estimator,
    *,
    divide_by_std: bool = False,
) -> list[list[float]]:
    """Advantages of all rollouts of a step, group by group.

    group                 R − mean(R) of the group, over its deviation with `divide_by_std` (Dr.GRPO, GRPO)
    rloo                  R − mean of the group's other rewards = G/(G − 1) (R − mean(R))
    reinforce             R, whitened over the response tokens of the whole step (REINFORCE++ without KL)
    reinforce_baseline    R − mean(R) of the group, whitened likewise

    Args:
        rewards: of each rollout of each group.
        lengths: response tokens of the same rollouts.
        estimator: which of the four.
        divide_by_std: with "group" only.
    """
    if estimator == "reinforce":
        return whitened([[float(r) for r in group] for group in rewards], lengths)
    centred = [group_advantages(group, divide_by_std=divide_by_std) for group in rewards]
    if estimator == "reinforce_baseline":
        return whitened(centred, lengths)
    if estimator == "rloo":
        return [[a * len(group) / max(1, len(group) - 1) for a in group] for group in centred]
    return centred


def whitened(values: Sequence[Sequence[float]], lengths: Sequence[Sequence[int]]) -> list[list[float]]:
    """(v − m) / sqrt(s² + 1e-8), m and s² (unbiased) over tokens: a response counts as often as it has tokens.

    Values that are all equal become exact zeros, so that their sequences can be skipped.
    """
    pairs = [(v, n) for row, counts in zip(values, lengths, strict=True) for v, n in zip(row, counts, strict=True)]
    tokens = sum(n for _, n in pairs)
    if len({v for v, n in pairs if n}) <= 1:
        return [[0.0] * len(row) for row in values]
    mean = sum(v * n for v, n in pairs) / tokens
    variance = sum(n * (v - mean) ** 2 for v, n in pairs) / (tokens - 1)
    scale = (variance + VARIANCE_FLOOR) ** -0.5
    return [[(v - mean) * scale for v in row] for row in values]


def overlong_reward(length: int, longest: int, margin: int, penalty: float) -> float:
    """min(0, −(len − (L − c))/c · f): what DAPO's soft punishment adds to the reward of a response.

    Args:
        length: its tokens.
        longest: L, most tokens that a response may have.
        margin: c, tokens before L over which the punishment grows.
        penalty: f, its size at L.
    """
    return min(0.0, -(length - (longest - margin)) / margin * penalty)


def group_advantages(rewards_G: Sequence[float], *, divide_by_std: bool) -> list[float]:
    """A_i = R_i − mean(R), divided by std(R) + 1e-6 if asked for (GRPO; Dr.GRPO and MIFO leave it out).

    The standard deviation is the unbiased one (G − 1). A group of one has no baseline: its mean counts as 0 and its
    deviation as 1, so the advantage is the reward. An all-equal group gets exact zeros, so that it can be skipped.
    """
    count = len(rewards_G)
    assert count > 0
    if count == 1:
        return [float(rewards_G[0])]
    if all(reward == rewards_G[0] for reward in rewards_G):
        return [0.0] * count
    mean = sum(rewards_G) / count
    centred = [reward - mean for reward in rewards_G]
    if not divide_by_std:
        return centred
    std = (sum(c * c for c in centred) / (count - 1)) ** 0.5
    return [c / (std + STD_FLOOR) for c in centred]


def hybrid_advantages(
    rewards_G: Sequence[float], form: HybridForm, *, divide_by_std: bool
) -> list[tuple[float, float]]:
    """(advantage of the prefix, advantage of the rest) of each rollout of a group whose last one continues a prefix.

    shared               A = R − mean of all G, for the whole response (Prefix-RFT Eq. 3)
    dr_grpo_prefix       plain: R − μ; hybrid: R − μ on its prefix and R on the rest; μ the mean of the G − 1 plain rewards
    dr_grpo_prefix_v2    the same, with 0 on the rest

    Args:
        rewards_G: those of the plain rollouts, then that of the hybrid.
        form: which of the three.
        divide_by_std: with "shared" only.
    """
    if form == "shared":
        return [(a, a) for a in group_advantages(rewards_G, divide_by_std=divide_by_std)]
    *plain, hybrid = rewards_G
    of_plain = [(a, a) for a in group_advantages(plain, divide_by_std=False)]
    rest = float(hybrid) if form == "dr_grpo_prefix" else 0.0
    return [*of_plain, (hybrid - sum(plain) / len(plain), rest)]
