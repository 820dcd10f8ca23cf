"""PPO with a critic and generalised advantage estimation; Open-Reasoner-Zero is γ = λ = 1 with a setting of its own.

    rollouts     the engine's critic gives a value before each token
    critic       ½ max((V − G)², (clip_{±ε} V − G)²) towards the returns G = A + V, in several updates
    policy       PPO's objective with A of GAE, whitened over all tokens of the step

The reward stands on the last token. A response that was cut off ends there too: nothing is bootstrapped, and what it earns is
`reward.truncated`'s business. In the first `critic_warmup_steps` steps the critic learns alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mifo.config.schema import Config, PpoMethod
from mifo.core.critic import ClippedValue, gae, whitened_tokens
from mifo.methods.base import Base
from mifo.methods.grpo import chosen_groups, rl_phase, shaped_rewards, weighted_updates
from mifo.methods.scored import rollouts_of, scores_of, split
from mifo.types import Group, Phase, ScorerName, Term, Update


class Ppo(Base):
    """RL whose baseline is a model."""

    needs_demonstrations = False
    least_demonstrations = 0
    optimizers = ("rl",)
    scorer: ScorerName | None = "critic"

    def __init__(self, method: PpoMethod, config: Config) -> None:
        self.method = method
        self.needs_reference = method.rl.kl_coefficient > 0
        self.longest_response = config.rollout.max_response_tokens
        self.step = 0

    def next_phase(self) -> Phase:
        """Always an RL step whose rollouts have values."""
        return replace(rl_phase(self.method.rl), scorer_learns="after")

    def updates(self, phase: Phase, groups: Sequence[Group]) -> list[Update]:
        """Policy gradient by the critic's advantages; nothing while the critic warms up."""
        self.step += 1
        if self.step <= self.method.critic_warmup_steps:
            return []
        groups = chosen_groups(self.method.rl, groups)
        rows = [advantages for group in groups for advantages, _ in self._estimates(group)]
        found = iter(whitened_tokens(rows) if self.method.whiten else rows)
        advantages = [[next(found) for _ in group.rollouts] for group in groups]
        return weighted_updates(self.method.rl, groups, advantages, self.longest_response)

    def scorer_updates(self, phase: Phase, groups: Sequence[Group]) -> list[Update]:
        """The critic's values towards the returns of all rollouts that are learned from."""
        clip = self.method.value_clip
        term = Term(name="value", loss=ClippedValue(clip), uses_old_policy=clip is not None, uses_target=True)
        groups = chosen_groups(self.method.rl, groups)
        returns = [target for group in groups for _, target in self._estimates(group)]
        values = [row for group in groups for row in scores_of(group)]
        sequences = [
            replace(sequence, weights={"value": 1.0}, target=target)
            for sequence, target in zip(rollouts_of(groups), returns, strict=True)
        ]
        return [
            Update(sequences=tuple(sequences[part]), terms=(term,), old_logprobs=tuple(values[part]))
            for part in split(len(sequences), self.method.critic_updates_per_step)
        ]

    def _estimates(self, group: Group) -> list[tuple[tuple[float, ...], tuple[float, ...]]]:
        """(advantages, returns) of each rollout."""
        rewards = shaped_rewards(self.method.rl, group, self.longest_response)
        return [
            gae(reward, values, discount=self.method.discount, gae_lambda=self.method.gae_lambda)
            for reward, values in zip(rewards, scores_of(group), strict=True)
        ]

    def progress(self) -> Mapping[str, float]:
        """No figures beside the step's own."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Steps taken."""
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.step = int(state["step"])
