"""Tables of RL with a second model that scores tokens, and of its optimizer: PPO's critic, PRIME's reward model.

Each is a method of its own, and may be the RL of a method whose RL has steps of its own (`method.scorer`). Rules of the schema
(see `config.schema`) hold here too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mifo.config.bounds import Count, CountOrZero, NonNegative, Positive, PositiveShare, Share
from mifo.config.tables import OptimizerConfig, PolicyGradientConfig


@dataclass(frozen=True, kw_only=True)
class CriticOptimizerConfig(OptimizerConfig):
    """The AdamW of PPO's critic."""

    learning_rate: Positive = 1e-5
    """Peak rate."""


@dataclass(frozen=True, kw_only=True)
class PrmOptimizerConfig(OptimizerConfig):
    """The AdamW of PRIME's reward model."""

    clip_norm: Positive | None = 10.0
    """Bound on the norm of the accumulated, reduced gradient; none: no bound."""


@dataclass(frozen=True, kw_only=True)
class CriticSettings:
    """What PPO does beyond its policy gradient."""

    discount: PositiveShare = 1.0
    """γ: what a reward is worth one token earlier."""
    gae_lambda: Share = 1.0
    """λ: 1 takes the whole response's reward, 0 trusts the critic's next value (0.95 and 1 are usual)."""
    whiten: bool = True
    """Subtract the mean of a step's advantages over tokens and divide by their deviation."""
    value_clip: Positive | None = 0.5
    """ε of the value loss: a value may move so far from the one before the step; none: no clipping."""
    critic_updates_per_step: Count = 2
    """Updates of the critic made from one step; the rollouts are split evenly between them."""
    critic_warmup_steps: CountOrZero = 0
    """First RL steps in which the critic learns alone."""


@dataclass(frozen=True, kw_only=True)
class RewardModelSettings:
    """What PRIME does beyond its policy gradient."""

    beta: Positive = 0.05
    """β of the reward model's loss BCE(σ(β Σ q), correct)."""
    prm_updates_per_step: Count = 1
    """Updates of the reward model made from one step; the rollouts are split evenly between them."""
    prm_update: Literal["after", "before"] = "after"
    """The reward model learns from a step's rollouts after it has scored them, or before."""
    dense_coefficient: NonNegative = 1.0
    """c: weight of the process advantage beside the outcome's (the authors' rm_coef = 5 does not reach their advantage)."""
    dense_baseline: Literal["leave_one_out", "scaled"] = "leave_one_out"
    """Mean of the other responses' token means, or the authors' code: N/(N−1)·q less the sum of all token means over N−1."""
    dense_norm: Literal["greatest_sum", "none"] = "greatest_sum"
    """Divide process rewards by the greatest absolute reverse sum of a step (the authors' batch_norm), or leave them."""
    discount: PositiveShare = 1.0
    """γ of the sums to the end of a response."""
    whiten: bool = True
    """Subtract the mean of a step's advantages over tokens and divide by their deviation."""
    least_accuracy: Share = 0.2
    """Questions with a lower share of correct rollouts are left out."""
    most_accuracy: Share = 0.8
    """Questions with a higher share of correct rollouts are left out."""


@dataclass(frozen=True, kw_only=True)
class PpoMethod(CriticSettings):
    """PPO: RL with a critic; Open-Reasoner-Zero is a setting of it."""

    name: Literal["ppo"] = "ppo"
    """Tag of this method."""
    rl: PolicyGradientConfig = field(default_factory=PolicyGradientConfig)
    """The policy gradient; its advantages are the critic's."""


@dataclass(frozen=True, kw_only=True)
class PrimeMethod(RewardModelSettings):
    """PRIME: RL with process rewards of a model that learns from outcomes as the policy does."""

    name: Literal["prime"] = "prime"
    """Tag of this method."""
    rl: PolicyGradientConfig = field(default_factory=PolicyGradientConfig)
    """The policy gradient; its advantages are those of outcome and process rewards."""


@dataclass(frozen=True, kw_only=True)
class PpoScorer(CriticSettings):
    """A method's RL is PPO."""

    name: Literal["ppo"] = "ppo"
    """Tag of this table."""


@dataclass(frozen=True, kw_only=True)
class PrimeScorer(RewardModelSettings):
    """A method's RL is PRIME."""

    name: Literal["prime"] = "prime"
    """Tag of this table."""


ScorerConfig = PpoScorer | PrimeScorer

OWNERS = {"critic_optimizer": "ppo", "prm_optimizer": "prime"}
"""The RL, by its name, that trains with each of these tables of a run."""
