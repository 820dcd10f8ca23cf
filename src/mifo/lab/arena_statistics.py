"""Means with intervals over seeds and problems, and paired differences.

Scores are a table of S seeds by P problems. With row means r_s (a run's accuracy), column means c_p (a problem's) and the mean
m, one draw of the bootstrap takes seeds s* and problems p* with replacement and is

    m + w(S) · (mean r_{s*} − m) + (mean c_{p*} − m)

The draws are the same for every method, so a difference is paired by seed and by problem: it is the bootstrap of the table of
differences. Intervals are the 2.5 % and 97.5 % quantiles of the draws (percentile bootstrap of a two-way layout; A. Owen 2007,
"The pigeonhole bootstrap", resamples both ways too, and adds the noise of single cells once more).

A resample of S seeds has (S − 1)/S of their variance, and the quantiles of so few are those of a normal at best, so the plain
bootstrap of three seeds covers far less than it says. Hence w(S) = √(S/(S−1)) · t_{S−1}/z, the expansion of T. Hesterberg 2015
("What teachers should know about the bootstrap"), on the part of the seeds alone. One seed has no such part: the interval then
says nothing about other seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray

from mifo.core.intervals import wilson

DRAWS = 4_000
DRAW_SEED = 20_250_215
COVERAGE = 0.95
Z95 = 1.959963984540054
SAME = 1e-12  # relative; what rounding may make of equal figures
Table = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean with its 95 % interval, and over how many seeds and problems; `seeds_agree` where several gave the same mean."""

    value: float
    low: float
    high: float
    seeds: int
    problems: int
    seeds_agree: bool = False

    @property
    def certain(self) -> bool:
        """Nothing varied: the interval has no width but that of rounding."""
        return self.high - self.low <= SAME * max(1.0, abs(self.value))

    @property
    def excludes_zero(self) -> bool:
        """Of a difference: its sign is outside doubt, as far as the interval goes."""
        return self.low > 0.0 or self.high < 0.0


@cache
def student_quantile(degrees: int) -> float:
    """x with P(|T| ≤ x) = 0.95 for Student's t. With x = √ν tan u the density of u is proportional to cos^{ν−1} u."""
    u = np.linspace(0.0, np.pi / 2, 200_001)
    density = np.cos(u) ** (degrees - 1)
    area = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return float(np.sqrt(degrees) * np.tan(np.interp(COVERAGE, area / area[-1], u)))


def widening(seeds: int) -> float:
    """w(S): by how much the bootstrap's spread over seeds is too small; 0 for one seed, which has none."""
    if seeds == 1:
        return 0.0
    return float(np.sqrt(seeds / (seeds - 1)) * student_quantile(seeds - 1) / Z95)


@lru_cache(maxsize=4)  # a table of a few thousand problems takes some hundred megabytes
def _counts(size: int, purpose: int) -> Table:
    """How often each of `size` items is in each draw, over `size`; [DRAWS, size], the same for everybody who asks."""
    draw = np.random.default_rng([DRAW_SEED, purpose, size])
    return draw.multinomial(size, np.full(size, 1.0 / size), size=DRAWS) / size


def interval(scores: Table) -> Estimate:
    """Mean of a table of scores, [seeds, problems], with its interval.

    A table of one column is a figure that each run has once, such as its response length.
    """
    seeds, problems = scores.shape
    mean = float(scores.mean())
    draws = np.full(DRAWS, mean)
    if seeds > 1:
        draws += widening(seeds) * (_counts(seeds, 0) @ (scores.mean(axis=1) - mean))
    if problems > 1:
        draws += _counts(problems, 1) @ (scores.mean(axis=0) - mean)
    low, high = np.quantile(draws, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return Estimate(
        value=mean,
        low=min(mean, float(low)),
        high=max(mean, float(high)),
        seeds=seeds,
        problems=problems,
        seeds_agree=seeds > 1 and float(np.ptp(scores.mean(axis=1))) <= SAME * max(1.0, abs(mean)),
    )


def share_interval(scores: Table) -> Estimate:
    """`interval` of shares: its ends are within 0 and 1, and where nothing varies it is Wilson's, one trial a problem."""
    found = interval(scores)
    low, high = found.low, found.high
    if found.certain:  # equal scores do not make a certainty
        bounds = wilson(found.value * found.problems, found.problems)
        low, high = bounds.low, bounds.high
    return replace(found, low=max(0.0, low), high=min(1.0, high))


Runs = Mapping[int, Mapping[str, float]]  # seed -> problem -> share of correct answers


def score_table(runs: Runs, seeds: Sequence[int], problems: Sequence[str]) -> Table:
    """Scores as a table, [seeds, problems], in the order given."""
    return np.array([[runs[seed][problem] for problem in problems] for seed in seeds], dtype=np.float64)


def shared_problems(runs: Sequence[Runs]) -> list[str]:
    """Problems that every run was measured on, in alphabetical order."""
    sets = [set(problems) for by_seed in runs for problems in by_seed.values()]
    return sorted(set.intersection(*sets)) if sets else []


def paired_difference(runs: Runs, reference: Runs) -> Estimate | None:
    """Mean of `runs` less that of `reference` over the seeds and problems that both have; None where they share none."""
    seeds = sorted(runs.keys() & reference.keys())
    problems = shared_problems([{s: runs[s] for s in seeds}, {s: reference[s] for s in seeds}])
    if not seeds or not problems:
        return None
    return difference_interval(score_table(runs, seeds, problems) - score_table(reference, seeds, problems))


def difference_interval(differences: Table, largest: float = 1.0) -> Estimate:
    """`interval` of differences of shares, [seeds, problems], none of which can exceed `largest` either way.

    Where no problem tells the two apart the interval is not without width: so many problems could, in either direction, and
    still show in none of these (Wilson's bound).
    """
    found = interval(differences)
    if found.certain:
        most = largest * wilson(0.0, found.problems).high
        found = replace(found, low=found.value - most, high=found.value + most)
    return replace(found, low=max(-largest, found.low), high=min(largest, found.high))
