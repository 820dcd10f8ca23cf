"""What a critic is for: generalised advantage estimation, and the loss that fits its values.

    δ_t = r_t + γ V_{t+1} − V_t        A_t = Σ_k (γλ)^k δ_{t+k}        G_t = A_t + V_t

V_t is the value before token t is chosen. A response is an episode: V is 0 behind its last token, also where it was cut off at
the greatest length, as in verl, OpenRLHF and Open-Reasoner-Zero (none of them bootstraps there). Sources: Schulman et al. 2016
(GAE, equation 16), Schulman et al. 2017 (PPO), the clipped value loss of the original implementation.

Legend: T tokens of one response, or response tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mifo.core.advantages import whitened
from mifo.types import TokenStats


def gae(
    reward: float, values_T: Sequence[float], *, discount: float, gae_lambda: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Advantages A and returns G of one response whose reward stands on its last token, each [T].

    Args:
        reward: of the response.
        values_T: the critic's, before each token.
        discount: γ.
        gae_lambda: λ; with γ = λ = 1 every G_t is the reward and A_t = reward − V_t.
    """
    advantages: list[float] = []
    later_advantage, later_value, token_reward = 0.0, 0.0, reward
    for value in reversed(values_T):
        surprise = token_reward + discount * later_value - value
        later_advantage = surprise + discount * gae_lambda * later_advantage
        advantages.append(later_advantage)
        later_value, token_reward = value, 0.0
    advantages.reverse()
    return tuple(advantages), tuple(a + v for a, v in zip(advantages, values_T, strict=True))


def whitened_tokens(rows: Sequence[Sequence[float]]) -> list[tuple[float, ...]]:
    """Numbers of the tokens of several responses, over all of them less their mean and over their deviation (`whitened`)."""
    return [tuple(row) for row in whitened(rows, [[1] * len(row) for row in rows])]


@dataclass(frozen=True, slots=True)
class ClippedValue:
    """½ max((V − G)², (V_old + clip(V − V_old, ±ε) − G)²), weight_T times: the value loss of PPO.

    `logp_T` holds the critic's values V, `old_logp_T` those from before any update of the turn, `target_T` the returns G. The
    greater of the two errors counts, so a value that moved by more than ε towards its return has no gradient. `clip` of None
    is the plain square.
    """

    clip: float | None = 0.5

    def __call__(self, stats: TokenStats) -> Tensor:
        value_T, return_T = stats.logp_T, stats.target_T
        assert return_T is not None
        error_T = (value_T - return_T).square()
        if self.clip is not None:
            assert stats.old_logp_T is not None
            near_T = stats.old_logp_T + (value_T - stats.old_logp_T).clamp(-self.clip, self.clip)
            error_T = torch.maximum(error_T, (near_T - return_T).square())
        return 0.5 * stats.weight_T * error_T
