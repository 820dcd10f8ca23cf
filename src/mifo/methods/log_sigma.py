"""SuperRL's third form (docs/methods.md): both losses of every question, weighted by what is learned of their noise.

    L = e^{−2σ₁}·PG + e^{−2σ₂}·NLL + σ₁ + σ₂        σ₁ = σ₂ = 0 at first

σ are the method's own: after each update σ ← σ − η (1 − 2 e^{−2σ} L_s), L_s the value that the update had. A policy-gradient
loss is about 0, or below, so nothing but the bound keeps σ₁ from falling on: its weight grows to e^{2·bound}. KL and entropy
bonus keep their coefficients.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from mifo.config.schema import Config, SuperRlMethod
from mifo.methods.base import Base
from mifo.methods.mixture import demonstrations_of, imitation_of, joined, own_update, parts, refers, scaled
from mifo.types import Group, Phase, Taken, Update

STREAMS = ("pg", "ce")


class LogSigma(Base):
    """RL and imitation of the same questions, each weighed by its own σ."""

    needs_demonstrations = True
    least_demonstrations = 1
    optimizers = ("rl",)

    def __init__(self, method: SuperRlMethod, config: Config) -> None:
        self.method = method
        self.longest_response = config.rollout.max_response_tokens
        self.longest_demonstration = config.data.max_demonstration_tokens
        self.needs_reference = refers(method.rl, method.sft)
        self.sigma = dict.fromkeys(STREAMS, 0.0)

    def weight(self, stream: str) -> float:
        """e^{−2σ} of a stream."""
        return math.exp(-2.0 * self.sigma[stream])

    def next_phase(self) -> Phase:
        """N rollouts of each question."""
        rl = self.method.rl
        return Phase(name="mixed", optimizer="rl", prompts=rl.prompts_per_step, rollouts=rl.rollouts_per_prompt)

    def updates(self, phase: Phase, groups: Sequence[Group]) -> list[Update]:
        """pg of the rollouts and ce of the demonstrations of every question; all updates of a step with the same σ."""
        return [update for part in parts(groups, self.method.rl.updates_per_step) for update in self._weighted(part)]

    def _weighted(self, groups: Sequence[Group]) -> list[Update]:
        taught = imitation_of(self.method.sft, demonstrations_of(groups), self.longest_demonstration)
        both = joined(own_update(self.method.rl, groups, self.longest_response), taught)
        for stream in STREAMS:
            both = scaled(both, self.weight(stream), only=stream)
        return both

    def learned(self, phase: Phase, steps: Sequence[Taken]) -> None:
        """σ a step further for each update taken, by the weighted losses it had."""
        rate, bound = self.method.sigma_rate, self.method.sigma_bound
        weights = {stream: self.weight(stream) for stream in STREAMS}  # that the steps had
        for step in steps:
            for stream in STREAMS:
                loss = step.losses.get(stream, 0.0) / weights[stream]
                moved = self.sigma[stream] - rate * (1.0 - 2.0 * self.weight(stream) * loss)
                self.sigma[stream] = min(max(moved, -bound), bound)

    def progress(self) -> Mapping[str, float]:
        """The weights of the coming step."""
        return {"rl_weight": self.weight("pg"), "sft_weight": self.weight("ce")}

    def state_dict(self) -> dict[str, Any]:
        """σ of both streams."""
        return {"sigma": dict(self.sigma)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.sigma = {stream: float(state["sigma"][stream]) for stream in STREAMS}
