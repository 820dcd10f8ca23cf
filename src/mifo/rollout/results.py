"""From the tokens of a batch to rollouts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from mifo.errors import NumericsError
from mifo.types import Rollout


def make_rollouts(
    tokens_BT: Tensor, logps_BT: Tensor, counts: Sequence[int], stopped: Sequence[bool], version: int
) -> list[Rollout]:
    """One rollout per row: the first `counts[b]` tokens of row b.

    Raises:
        NumericsError: a log-prob of a response is NaN or infinite.
    """
    rollouts = []
    for tokens, logps, count, stop in zip(tokens_BT.tolist(), logps_BT.tolist(), counts, stopped, strict=True):
        if not all(map(math.isfinite, logps[:count])):
            raise NumericsError(
                "rollout log-probs are not finite: the policy's logits hold NaN or infinity; lower the learning rate "
                "or use float32, and resume from an earlier checkpoint"
            )
        rollouts.append(
            Rollout(
                token_ids=tuple(tokens[:count]),
                logprobs=tuple(logps[:count]),
                stop="stop" if stop else "length",
                weight_version=version,
            )
        )
    return rollouts
