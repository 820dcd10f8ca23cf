"""The RL of a method whose RL has steps of its own: GRPO with its switches, or PPO or PRIME with their second model.

It is itself a method, which the one around it asks for phases and updates. In SFT steps the second model stands still, and learns
what became of the policy from the rollouts that follow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from mifo.config.schema import (
    Config,
    GrpoMethod,
    MifoMethod,
    MultiStageMethod,
    PpoMethod,
    PrimeMethod,
    ReliftMethod,
    RlSftMethod,
    ScorerConfig,
    SftRlMethod,
)
from mifo.methods.base import Base, Method
from mifo.methods.grpo import Grpo
from mifo.methods.ppo import Ppo
from mifo.methods.prime import Prime
from mifo.methods.sft import adapters_of, imitates_with_reference
from mifo.types import Group, Phase, Update

MethodAroundRl = MifoMethod | ReliftMethod | SftRlMethod | RlSftMethod | MultiStageMethod


def make_rl(method: MethodAroundRl, config: Config) -> Method:
    """RL alone, as `method.rl` and `method.scorer` ask for it."""
    scorer = method.scorer
    if scorer is None:
        return Grpo(GrpoMethod(rl=method.rl), config)
    if scorer.name == "ppo":
        return Ppo(PpoMethod(rl=method.rl, **_settings(scorer)), config)
    return Prime(PrimeMethod(rl=method.rl, **_settings(scorer)), config)


def _settings(scorer: ScorerConfig) -> dict[str, float]:
    return {f.name: getattr(scorer, f.name) for f in dataclasses.fields(scorer) if f.name != "name"}


class AroundRl(Base):
    """What methods share that have RL steps of one kind and SFT steps of another."""

    optimizers = ("rl", "sft")

    def __init__(self, method: MethodAroundRl, config: Config) -> None:
        self.rl = make_rl(method, config)
        self.scorer = self.rl.scorer
        self.needs_reference = self.rl.needs_reference or imitates_with_reference(method.sft)
        self.adapters = adapters_of(method.sft)
        self.longest_demonstration = config.data.max_demonstration_tokens

    def scorer_updates(self, phase: Phase, groups: Sequence[Group]) -> list[Update]:
        """Those of the RL."""
        return self.rl.scorer_updates(phase, groups)
