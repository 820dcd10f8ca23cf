"""What a method is: three decisions, given to the engine as data (DESIGN 1).

`next_phase` says what the next step does and what may move; `updates` says what enters each optimizer step and how much
each sequence counts. A method never runs a model, never divides and never sees an optimizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from mifo.types import Freeze, Group, LowRank, Phase, ScorerName, Taken, Update


class Method(Protocol):
    """The interface of every method."""

    needs_demonstrations: bool
    """Train only on problems that have a demonstration."""
    least_demonstrations: int
    """How many different demonstrations the data must hold for this method to learn from any (MIFO: a full buffer)."""
    needs_reference: bool
    """Some term compares with the model as it was loaded."""
    optimizers: tuple[Literal["rl", "sft"], ...]
    """The optimizers that its phases name; each keeps moments of its own."""
    freeze: Freeze | None
    """What SFT phases must not move; None needs neither snapshot nor importance map."""
    scorer: ScorerName | None
    """The second model, with an optimizer of its own, that scores the tokens of rollouts; None needs none."""
    adapters: LowRank | None
    """What SFT phases train in place of the weights; None trains the weights."""

    def next_phase(self) -> Phase:
        """What the next step does; does not change the method."""
        ...

    def updates(self, phase: Phase, groups: Sequence[Group]) -> list[Update]:
        """The optimizer steps to take from what the step collected, in order."""
        ...

    def learned(self, phase: Phase, steps: Sequence[Taken]) -> None:
        """What the engine measured of the optimizer steps that it took from `updates`, in order."""
        ...

    def scorer_updates(self, phase: Phase, groups: Sequence[Group]) -> list[Update]:
        """The optimizer steps of the scorer, in order; scores are there if it learns after them. Leaves the method as it is."""
        ...

    def sft_measured(self, before: float, after: float) -> None:
        """Accuracy just before and just after the SFT phase that ends, where the run measures both."""
        ...

    def progress(self) -> Mapping[str, float]:
        """Figures of the method's own state for metrics (buffer fill)."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Own state as plain data."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        ...


class Base:
    """What most methods share: no reference, no second model, nothing frozen, no adapters; what was measured changes nothing."""

    needs_reference = False
    freeze: Freeze | None = None
    adapters: LowRank | None = None
    scorer: ScorerName | None = None

    def scorer_updates(self, phase: Phase, groups: Sequence[Group]) -> list[Update]:
        """Nothing learns beside the policy."""
        return []

    def sft_measured(self, before: float, after: float) -> None:
        """Nothing follows from it."""

    def learned(self, phase: Phase, steps: Sequence[Taken]) -> None:
        """Not looked at."""


class Stateless(Base):
    """What methods share that are the same at every step: nothing to report, nothing to save."""

    def progress(self) -> Mapping[str, float]:
        """No state to report."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """No state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """No state."""
