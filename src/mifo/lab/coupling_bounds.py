"""What the theorems of S4 say of measured quantities, and whether their assumptions hold.

A task with one right label, whose reward is R_max for it and −R_max for anything else. The data's distribution is then that
label, so with p(x) = p_1(y*|x), which is measured exactly, and the samples of p_1 that are not y*:

    Z(x)   = p e^{R/β} + (1 − p) · mean over those samples of e^{r/β}
    C_1    = E_x [log Z(x) − R_max/β]                         ≈ E_x log p for a small β, for the samples are hardly ever right

Z by the samples alone would mostly say for how many texts none was right: each of those puts about −2 R_max/β into C_1. It stands
beside, with that number.

    Theorem 3.1    L(p_2) = L(p_1) + C_1, if p_1 is the data's distribution (eq. 10: L(p_1) = 0, so C_1 = 0) and p_2 the optimum
                   of RL (eq. 12: J = E_x E_{p_1 e^{r/β}/Z} r, about R_max for a small β)
    Proposition 1  J(p_2) ≤ J(p_1) + R_max √(2B), B the measured KL; says nothing where the right side is R_max or more
    Theorem 4.1    J(p_2) ≤ J(p_1) − C_2, if p_1 is a local maximum of J (Assumption 3); a rise of J shows that it is not. λ =
                   (J(p_1) − J(p_2))/KL is the growth that the measurement implies

Every comparison is of the same texts under two models, so its interval is that of the mean of paired differences, by Student's t.
Where no text tells two rewards apart it is as wide as Wilson's bound allows. One text decides nothing. B is measured, so
Proposition 1 is held against both ends of its interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from mifo.core.intervals import wilson
from mifo.lab.arena_statistics import student_quantile
from mifo.lab.claims import SAME_LOSS

R_MAX = 1.0
DRAWS = 2000
Verdict = Literal["holds", "fails", "cannot be told", "says nothing"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A figure with its 95 % interval, over so many texts; of one text there is none."""

    value: float
    low: float
    high: float
    texts: int

    def __str__(self) -> str:
        if self.texts == 1:
            return f"{self.value:.3g} (one text)"
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """One statement of the paper at one checkpoint: what it says, what was measured, and why it may not apply.

    `difference` is measured less predicted, with the interval by which the verdict was given.
    """

    statement: str
    label: str
    predicted: float
    measured: float
    difference: Estimate
    verdict: Verdict
    caveat: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Texts:
    """One checkpoint on the same texts as the others: the loss of the right label, the mean reward of samples at temperature 1
    and their mean log p_2/p_1, one of each a text."""

    label: str
    sft_loss: Sequence[float]
    objective: Sequence[float]
    kl: Sequence[float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """C_1(β) with its interval over texts; by the samples alone; and for how many of the texts none of these was right.

    `optimum` is J at RL's optimum (eq. 12), `by_text` C_1's summand of each text.
    """

    value: Estimate
    by_samples: float
    without_right_sample: int
    optimum: float
    by_text: tuple[float, ...]


def mean_estimate(values: Sequence[float]) -> Estimate:
    """A mean with Student's 95 % interval over independent values; of one value the interval is that value."""
    mean, count = sum(values) / len(values), len(values)
    if count == 1:
        return Estimate(value=mean, low=mean, high=mean, texts=1)
    variance = sum((v - mean) ** 2 for v in values) / (count - 1)
    half = student_quantile(count - 1) * math.sqrt(variance / count)
    return Estimate(value=mean, low=mean - half, high=mean + half, texts=count)


def mean_reward(values: Sequence[float], largest: float = R_MAX) -> Estimate:
    """`mean_estimate` of rewards, or of differences of them, within ± `largest`; as wide as Wilson allows where all are equal."""
    found = mean_estimate(values)
    if found.texts > 1 and len(set(values)) == 1:
        most = 2.0 * largest * wilson(0.0, found.texts).high
        found = replace(found, low=found.value - most, high=found.value + most)
    return replace(found, low=max(-largest, found.low), high=min(largest, found.high))


def c1(
    log_right: Sequence[float], rewards: Sequence[Sequence[float]], others: Sequence[Sequence[float]], beta: float
) -> Constant:
    """C_1(β) of a first phase.

    Args:
        log_right: log p_1(y*|x) of each text.
        rewards: of all samples of each text.
        others: of those that are not y*; none are taken to be wrong.
        beta: β.
    """
    summands, optima = [], []
    for logp, rest in zip(log_right, others, strict=True):
        right = min(logp, 0.0)
        wrong = math.log(-math.expm1(right)) if right < 0.0 else -math.inf
        rows = np.array(list(rest) or [-R_MAX]) / beta
        log_z = np.logaddexp(right + R_MAX / beta, wrong + _log_mean_exp(rows))
        summands.append(float(log_z - R_MAX / beta))
        weighted = (rows * beta * np.exp(rows - rows.max())).sum() / np.exp(rows - rows.max()).sum()
        share = float(np.exp(right + R_MAX / beta - log_z))
        optima.append(share * R_MAX + (1.0 - share) * float(weighted))
    plain = [_log_mean_exp(np.array(row) / beta) - R_MAX / beta for row in rewards]
    return Constant(
        value=mean_estimate(summands),
        by_samples=sum(plain) / len(plain),
        without_right_sample=sum(max(row) < R_MAX for row in rewards),
        optimum=sum(optima) / len(optima),
        by_text=tuple(summands),
    )


def _log_mean_exp(rows: np.ndarray) -> float:
    return float(np.logaddexp.reduce(rows) - math.log(len(rows)))


def sft_rl_bounds(constant: Constant, points: Sequence[Texts]) -> tuple[Bound, ...]:
    """Theorem 3.1 at every checkpoint after the first."""
    first, bounds = points[0], []
    for point in points[1:]:
        caveat = "; ".join(_assumptions(constant, first, point))
        rise = [b - a for a, b in zip(first.sft_loss, point.sft_loss, strict=True)]
        beyond = mean_estimate([d - c for d, c in zip(rise, constant.by_text, strict=True)])
        before, after = _mean(first.sft_loss), _mean(point.sft_loss)
        bounds.append(
            Bound(
                statement="Theorem 3.1: L_SFT(p_2) = L_SFT(p_1) + C_1",
                label=point.label,
                predicted=before + constant.value.value,
                measured=after,
                difference=beyond,
                verdict=_equal(beyond),
                caveat=caveat,
            )
        )
        bounds.append(
            Bound(
                statement="Theorem 3.1: L_SFT(p_2) ≥ L_SFT(p_1)",
                label=point.label,
                predicted=before,
                measured=after,
                difference=mean_estimate(rise),
                verdict=above(mean_estimate(rise)),
                caveat=caveat,
            )
        )
    return tuple(bounds)


def _assumptions(constant: Constant, first: Texts, point: Texts) -> list[str]:
    start, objective = mean_estimate(first.sft_loss), mean_reward(point.objective)
    found = []
    if start.texts > 1 and start.low > 0.0:
        found.append(f"eq. 10 fails: the first phase has loss {start.value:.3g}, where matching the data means 0")
    if start.texts > 1 and objective.high < constant.optimum:
        found.append(f"eq. 12 fails: J = {objective}, where RL's optimum has {constant.optimum:.3g}")
    if start.texts > 1 and constant.value.high < 0.0:
        found.append(f"C_1 = {constant.value} is negative, which eq. 10 rules out")
    return found


def rl_sft_bounds(points: Sequence[Texts]) -> tuple[Bound, ...]:
    """Proposition 1 and Theorem 4.1 at every checkpoint after the first."""
    first, bounds = points[0], []
    start = _mean(first.objective)
    for point in points[1:]:
        change = mean_reward([b - a for a, b in zip(first.objective, point.objective, strict=True)], 2.0 * R_MAX)
        kl = mean_estimate(point.kl)
        allowed, least, most = (R_MAX * math.sqrt(2.0 * max(0.0, b)) for b in (kl.value, kl.low, kl.high))
        empty = start + allowed >= R_MAX
        room = Estimate(
            value=allowed - change.value, low=least - change.high, high=most - change.low, texts=change.texts
        )
        bounds.append(
            Bound(
                statement="Proposition 1: J(p_2) ≤ J(p_1) + R_max √(2B)",
                label=point.label,
                predicted=start + allowed,
                measured=_mean(point.objective),
                difference=_negated(room),
                verdict="says nothing" if empty else above(room),
                caveat="the bound is at or above the greatest reward" if empty else "",
            )
        )
        drop = above(_negated(change))
        bounds.append(
            Bound(
                statement="Theorem 4.1: J(p_2) < J(p_1)",
                label=point.label,
                predicted=start,
                measured=_mean(point.objective),
                difference=change,
                verdict=drop,
                caveat="Assumption 3 fails: J rose, so p_1 was no local maximum of it"
                if drop == "fails"
                else f"Assumption 3 (p_1 a local maximum of J) is taken for granted; implied λ = {_growth(first, point)}",
            )
        )
    return tuple(bounds)


def _growth(first: Texts, point: Texts) -> str:
    """λ = (J(p_1) − J(p_2))/KL with the interval of a bootstrap over texts; "not known" where the KL may be 0 or J changed by the
    same on every text."""
    drops = np.array(first.objective) - np.array(point.objective)
    kl = np.array(point.kl)
    if len(kl) == 1:
        return "not known of one text"
    rows = np.random.default_rng(0).integers(len(kl), size=(DRAWS, len(kl)))
    below = kl[rows].mean(1)
    if kl.mean() <= 0.0 or np.quantile(below, 0.025) <= 0.0:
        return "not known, for the KL may be 0"
    if (drops == drops[0]).all():
        return "not known, for J changed by the same on every text"
    low, high = np.quantile(drops[rows].mean(1) / below, [0.025, 0.975])
    return str(Estimate(value=float(drops.mean() / kl.mean()), low=float(low), high=float(high), texts=len(kl)))


def _negated(estimate: Estimate) -> Estimate:
    return replace(estimate, value=-estimate.value, low=-estimate.high, high=-estimate.low)


def _equal(difference: Estimate) -> Verdict:
    """Whether a difference of losses is zero within `SAME_LOSS`, as far as its interval tells: a wide one says nothing."""
    if difference.texts == 1:
        return "cannot be told"
    if difference.low > -SAME_LOSS and difference.high < SAME_LOSS:
        return "holds"
    return "fails" if difference.low > SAME_LOSS or difference.high < -SAME_LOSS else "cannot be told"


def above(difference: Estimate) -> Verdict:
    """Whether a difference is above zero, as far as its interval tells."""
    if difference.texts == 1:
        return "cannot be told"
    if difference.low > 0.0:
        return "holds"
    return "fails" if difference.high < 0.0 else "cannot be told"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
