"""Intervals of accuracies and of what they change by: over problems, of one model."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mifo.types import Interval

Z95 = 1.959963984540054


def wilson(successes: float, trials: int) -> Interval:
    """A proportion with Wilson's 95 % interval (Wilson 1927); sensible also at 0 and at 1."""
    assert trials > 0
    share = successes / trials
    centre = (share + Z95**2 / (2 * trials)) / (1 + Z95**2 / trials)
    half = Z95 / (1 + Z95**2 / trials) * math.sqrt(share * (1 - share) / trials + Z95**2 / (4 * trials**2))
    return Interval(
        value=share, low=min(share, max(0.0, centre - half)), high=max(share, min(1.0, centre + half)), count=trials
    )


def mean_interval(scores: Sequence[float], *, samples: int) -> Interval:
    """Mean of problem scores with its 95 % interval.

    Args:
        scores: one in [0, 1] a problem.
        samples: responses behind each; 1 makes the scores Bernoulli trials.
    """
    count = len(scores)
    if samples == 1 or count == 1:
        return wilson(sum(scores), count)
    mean = sum(scores) / count
    if len(set(scores)) == 1:  # no spread to estimate from: one trial a problem is the cautious reading
        return wilson(sum(scores), count)
    deviation = math.sqrt(sum((s - mean) ** 2 for s in scores) / (count - 1))
    half = Z95 * deviation / math.sqrt(count)
    return Interval(value=mean, low=max(0.0, mean - half), high=min(1.0, mean + half), count=count)


def paired_interval(before: Sequence[float], after: Sequence[float]) -> Interval:
    """Mean change of problem scores with its normal 95 % interval, over the same problems.

    Where all change alike it is as wide as Wilson's bound: so many problems could have changed and still show in none.

    Args:
        before: one in [0, 1] a problem, at least one.
        after: of the same problems in the same order.
    """
    changes = [b - a for a, b in zip(before, after, strict=True)]
    count, mean = len(changes), sum(changes) / len(changes)
    if len(set(changes)) == 1:
        half = wilson(0.0, count).high
    else:
        half = Z95 * math.sqrt(sum((c - mean) ** 2 for c in changes) / (count - 1) / count)
    return Interval(value=mean, low=max(-1.0, mean - half), high=min(1.0, mean + half), count=count)
