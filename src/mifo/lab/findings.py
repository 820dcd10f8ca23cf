"""A paper's claim beside what was measured: reproduces, does not, or cannot be told."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mifo.lab.arena_statistics import Estimate, interval

Verdict = Literal["reproduces", "does not", "cannot be told"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One claim with its source, what was measured of it with its 95 % interval, and the verdict."""

    claim: str
    source: str
    measured: str
    estimate: Estimate | None
    verdict: Verdict


def is_positive(estimate: Estimate | None) -> Verdict:
    """The verdict on a claim that the estimate is above zero; an interval without width says nothing."""
    if estimate is None or estimate.low == estimate.high or not estimate.excludes_zero:
        return "cannot be told"
    return "reproduces" if estimate.low > 0 else "does not"


def is_small(estimate: Estimate | None, margin: float) -> Verdict:
    """The verdict on a claim that the estimate is zero: within ±margin, clearly beyond it, or neither."""
    if estimate is None or estimate.low == estimate.high:
        return "cannot be told"
    if -margin <= estimate.low and estimate.high <= margin:
        return "reproduces"
    return "does not" if estimate.low > margin or estimate.high < -margin else "cannot be told"


def opposite(estimate: Estimate | None) -> Estimate | None:
    """The estimate of the negative, for claims that something falls."""
    if estimate is None:
        return None
    return Estimate(
        value=-estimate.value,
        low=-estimate.high,
        high=-estimate.low,
        seeds=estimate.seeds,
        problems=estimate.problems,
    )


def over_seeds(values: Sequence[float]) -> Estimate | None:
    """A figure that each run has once, with its interval over seeds; None without any that is finite."""
    known = [value for value in values if math.isfinite(value)]
    return interval(np.array(known, dtype=np.float64)[:, None]) if known else None


def paired(
    first: Mapping[int, float], second: Mapping[int, float], how: Callable[[float, float], float]
) -> Estimate | None:
    """`how` of both over the seeds that both have, such as their difference or the logarithm of their ratio."""
    return over_seeds([how(first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())])


def difference(one: float, other: float) -> float:
    """one − other."""
    return one - other


def log_ratio(one: float, other: float) -> float:
    """log(one/other); not a number where one of them is not positive."""
    return math.log(one / other) if one > 0 and other > 0 else math.nan
