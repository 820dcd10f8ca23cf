"""Learning rates: every method is tried at the same number of points, and the best on validation problems runs in the final."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Factors = tuple[float, float]  # of the recipe's RL and SFT rate


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One point of a grid; `accuracy` on the validation problems, None where its run failed."""

    factors: Factors
    rates: tuple[float, float]
    accuracy: float | None
    flops: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The rates that a method runs with, and what was tried; `trials` is empty where nothing was."""

    entry: str
    factors: Factors
    rates: tuple[float, float]
    optimizers: tuple[str, ...]
    trials: tuple[Trial, ...] = ()

    @property
    def at_edge(self) -> bool:
        """Of some rate three or more values were tried and the largest or smallest was best: others beyond it may be better."""
        axes = [{trial.factors[i] for trial in self.trials} for i in range(2)]
        return any(len(a) > 2 and self.factors[i] in (min(a), max(a)) for i, a in enumerate(axes))

    def describe(self) -> str:
        """The rates of the optimizers that the method has."""
        named = dict(zip(("rl", "sft"), self.rates, strict=True))
        return ", ".join(f"{name} {named[name]:.3g}" for name in self.optimizers)


def select(trials: Sequence[Trial]) -> Trial | None:
    """The trial with the highest accuracy; of equal ones that nearest to the recipe's rates, then the first. None: all failed."""
    finished = [trial for trial in trials if trial.accuracy is not None]
    if not finished:
        return None

    def merit(trial: Trial) -> tuple[float, float]:
        assert trial.accuracy is not None
        return trial.accuracy, -sum(abs(math.log(factor)) for factor in trial.factors)

    return max(finished, key=merit)
