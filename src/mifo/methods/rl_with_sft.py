"""RL with SFT loss (docs/methods.md): policy gradient of N − 1 rollouts plus λ·NLL of the demonstration.

The advantage is that of the rollouts alone, and each stream has its own denominator.
"""

from __future__ import annotations

from collections.abc import Sequence

from mifo.config.schema import Config, RlWithSftMethod
from mifo.methods.base import Stateless
from mifo.methods.mixture import demonstrations_of, imitation_of, joined, own_update, parts, refers, scaled
from mifo.types import Group, Phase, Update


class RlWithSft(Stateless):
    """One update of policy gradient and imitation."""

    needs_demonstrations = True
    least_demonstrations = 1
    optimizers = ("rl",)

    def __init__(self, method: RlWithSftMethod, config: Config) -> None:
        self.method = method
        self.longest_response = config.rollout.max_response_tokens
        self.longest_demonstration = config.data.max_demonstration_tokens
        self.needs_reference = refers(method.rl, method.sft)

    def next_phase(self) -> Phase:
        """N − 1 rollouts of each question."""
        rl = self.method.rl
        return Phase(name="mixed", optimizer="rl", prompts=rl.prompts_per_step, rollouts=rl.rollouts_per_prompt - 1)

    def updates(self, phase: Phase, groups: Sequence[Group]) -> list[Update]:
        """pg on rollouts, λ·ce on demonstrations."""
        return [
            update
            for part in parts(groups, self.method.rl.updates_per_step)
            for update in joined(
                own_update(self.method.rl, part, self.longest_response),
                scaled(
                    imitation_of(self.method.sft, demonstrations_of(part), self.longest_demonstration),
                    self.method.sft_coefficient,
                ),
            )
        ]
