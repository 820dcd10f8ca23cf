"""Group baselines: rewards of the rollouts of one prompt in, one advantage a rollout out (METHODS 4).

Legend: G rollouts of one group.
"""

from __future__ import annotations

from collections.abc import Sequence

STD_FLOOR = 1e-6  # added to the group's standard deviation, as verl does


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
