"""What a paper claims beside what was measured, and from the interval to a verdict by one rule for all claims.

A claim says on which side of a bound a figure lies: above it, below it, or within ± a margin of it. Its 95 % interval decides:
wholly on that side the claim reproduces, wholly on the other it does not, and otherwise it cannot be told at this scale.
One seed says nothing about others, so its claims cannot be told however narrow the interval over problems is; nor can those of
seeds that all gave the very same figure, which have no spread to tell from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from mifo.lab.arena_statistics import Estimate, Runs, difference_interval, interval, score_table, shared_problems

Verdict = Literal["reproduces", "does not", "cannot be told"]
Side = Literal["above", "below", "within"]
Unit = Literal["points", "ratio", "nats"]
KEPT = 0.02
"""What a score may lose and still count as kept: two points. The papers give no margin."""
SAME_LOSS = 0.05
"""Nats: a loss that changes by less counts as unchanged. The papers give no margin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One comparison that a paper makes, and what was found.

    `margin` is what "within" allows on both sides of `bound`. `measured` is None where the runs did not give the figure.
    `undecided` is a reason for which no interval could decide, such as RL without rewards; empty: there is none.
    """

    text: str
    paper: str
    unit: Unit
    side: Side
    bound: float = 0.0
    margin: float = 0.0
    measured: Estimate | None = None
    undecided: str = ""

    @property
    def verdict(self) -> Verdict:
        """By the interval, see above."""
        found = self.measured
        if self.undecided or found is None or found.seeds < 2 or found.certain or found.seeds_agree:
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
    return replace(found, value=value, low=low, high=high)


def both(first: Mapping[int, float], second: Mapping[int, float]) -> dict[int, tuple[float, float]]:
    """The two figures of each seed that has both."""
    return {seed: (first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())}


def difference_over_seeds(first: Mapping[int, float], second: Mapping[int, float]) -> Estimate | None:
    """Mean of first − second, paired by seed."""
    return over_seeds({seed: a - b for seed, (a, b) in both(first, second).items()})


def ratio(first: Mapping[int, float], second: Mapping[int, float]) -> Estimate | None:
    """Geometric mean of first / second, paired by seed; seeds where one is zero are left out."""
    return ratio_over_seeds({seed: a / b for seed, (a, b) in both(first, second).items() if a > 0 and b > 0})


def contrast(scores: Sequence[tuple[float, Runs]]) -> Estimate | None:
    """Weighted sum of accuracies, such as a difference of differences, paired by seed and problem.

    Args:
        scores: each weight with the scores on single problems that it is for, by seed.

    Returns:
        With the interval over seeds and problems; None where no seed has all of them.
    """
    seeds = sorted(set.intersection(*(set(runs) for _, runs in scores)))
    if not seeds:
        return None
    own = [{seed: runs[seed] for seed in seeds} for _, runs in scores]
    problems = shared_problems(own)
    tables = [weight * score_table(runs, seeds, problems) for (weight, _), runs in zip(scores, own, strict=True)]
    return difference_interval(np.sum(tables, axis=0), largest=sum(abs(weight) for weight, _ in scores) / 2)


# --- as text -----------------------------------------------------------------------------------------------------------


def figure(claim: Claim) -> str:
    """What was measured, with its interval; accuracies in points."""
    found, reason = claim.measured, f"; {claim.undecided}" if claim.undecided else ""
    if found is None:
        return f"not measured{reason}"
    if claim.unit == "points":
        return f"{in_points(found)}{reason}"
    value, low, high = (f"{end:.3g}" for end in (found.value, found.low, found.high))
    unit = "" if claim.unit == "ratio" else f" {claim.unit}"
    return f"{value}{unit} [{low}, {high}]{reason}"


def in_points(found: Estimate) -> str:
    """A difference of accuracies with its interval."""
    value, low, high = (f"{100 * end:+.1f}" for end in (found.value, found.low, found.high))
    return f"{value} points [{low}, {high}]"


def expected(claim: Claim) -> str:
    """What the interval is held against."""
    scale, unit = (100.0, " points") if claim.unit == "points" else (1.0, "")
    if claim.side == "within":
        around = "" if claim.bound == 0.0 else f"{scale * claim.bound:g} "
        return f"within {around}±{scale * claim.margin:g}{unit}"
    return f"{'>' if claim.side == 'above' else '<'} {scale * claim.bound:g}{unit}"
