"""From the tokens of a batch to rollouts."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from mifo.errors import NumericsError
from mifo.rollout.request import Span
from mifo.types import Rollout


def make_rollouts(
    tokens_BT: Tensor,
    logps_BT: Tensor,
    counts: Sequence[int],
    stopped: Sequence[bool],
    version: int,
    spans: Sequence[Span],
) -> list[Rollout]:
    """One rollout per row: the first `counts[b]` tokens of row b. `spans` say which rollouts of the request the rows are.

    Raises:
        NumericsError: log-probs of responses are NaN or infinite; says of which rollouts.
    """
    rollouts, bad = [], []
    owners = [(span.prompt, span.first + i) for span in spans for i in range(span.count)]
    for tokens, logps, count, stop in zip(tokens_BT.tolist(), logps_BT.tolist(), counts, stopped, strict=True):
        if not all(map(math.isfinite, logps[:count])):
            bad.append(owners[len(rollouts)])
        rollouts.append(
            Rollout(
                token_ids=tuple(tokens[:count]),
                logprobs=tuple(logps[:count]),
                stop="stop" if stop else "length",
                weight_version=version,
            )
        )
    if bad:
        raise NumericsError(
            f"log-probs of {len(bad)} of {len(rollouts)} rollouts are not finite: the policy's logits hold NaN or infinity. "
            "Lower the learning rate or use float32, and resume from an earlier checkpoint.",
            bad,
        )
    return rollouts
