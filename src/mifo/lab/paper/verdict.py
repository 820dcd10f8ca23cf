"""From an interval to a verdict, by one rule for all claims.

A claim says on which side of a bound a figure lies: above it, below it, or within ± a margin of it. Its 95 % interval decides:
wholly on that side the claim reproduces, wholly on the other it does not, and otherwise it cannot be told at this scale.
One seed says nothing about others, so its claims cannot be told however narrow the interval over problems is; nor can those of
seeds that all gave the very same figure, whose interval has no width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mifo.lab.arena_statistics import Estimate, interval

Verdict = Literal["reproduces", "does not", "cannot be told"]
Side = Literal["above", "below", "within"]
Unit = Literal["points", "ratio", "nats", "tokens", "share", "loss", "norm"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One comparison that a paper makes, and what was found.

    `margin` is what "within" allows on both sides of `bound`. `measured` is None where the runs did not give the figure;
    `why_not` says why.
    """

    text: str
    paper: str
    unit: Unit
    side: Side
    bound: float = 0.0
    margin: float = 0.0
    measured: Estimate | None = None
    why_not: str = ""

    @property
    def verdict(self) -> Verdict:
        """By the interval, see above."""
        found = self.measured
        if found is None or found.seeds < 2 or found.low == found.high:
            return "cannot be told"
        low, high = found.low - self.bound, found.high - self.bound
        if self.side == "within":
            if low > -self.margin and high < self.margin:
                return "reproduces"
            return "does not" if low > self.margin or high < -self.margin else "cannot be told"
        if self.side == "below":
            low, high = -high, -low
        if low > 0.0:
            return "reproduces"
        return "does not" if high < 0.0 else "cannot be told"


def overall(claims: Sequence[Claim]) -> Verdict:
    """Of a finding: it reproduces where all its claims do, does not where one does not, and cannot be told otherwise."""
    verdicts = {claim.verdict for claim in claims}
    if "does not" in verdicts:
        return "does not"
    return "reproduces" if verdicts == {"reproduces"} else "cannot be told"


def over_seeds(values: Mapping[int, float]) -> Estimate | None:
    """Mean and interval of a figure that each seed gives once; None without any."""
    if not values:
        return None
    return interval(np.array([[value] for _, value in sorted(values.items())]))


def ratio_over_seeds(values: Mapping[int, float]) -> Estimate | None:
    """Geometric mean and interval of ratios above 0, one a seed: the interval is that of their logarithms."""
    found = over_seeds({seed: float(np.log(value)) for seed, value in values.items() if value > 0})
    if found is None:
        return None
    value, low, high = (float(np.exp(end)) for end in (found.value, found.low, found.high))
    return Estimate(value=value, low=low, high=high, seeds=found.seeds, problems=found.problems)
