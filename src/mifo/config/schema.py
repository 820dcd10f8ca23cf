"""The configuration of a run: frozen dataclasses, units and scope in the names.

One `[method]` table, tagged by `name`, says which method and with which settings. Every field is checked before anything is
loaded (`config.load`), every field changes behaviour, and the resolved values are saved with the run. Defaults are the
paper's (S0 App. C) unless a field says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from mifo.config.bounds import Count, Positive, PositiveShare, Share, ShareBelowOne
from mifo.config.legacy import LegacyConfig
from mifo.config.method_tables import (
    BreadMethod,
    ChordMethod,
    HptMethod,
    PrefixRftMethod,
    SasrMethod,
    SrftMethod,
    SuperRlMethod,
    UftMethod,
)
from mifo.config.rejuvenation import IntervalRejuvenationConfig, RejuvenationConfig
from mifo.config.scored import CriticOptimizerConfig, PpoMethod, PrimeMethod, PrmOptimizerConfig, ScorerConfig
from mifo.config.tables import (
    DataConfig,
    EvaluationConfig,
    FreezeControlConfig,
    GuardConfig,
    ImitationConfig,
    ModelConfig,
    OptimizerConfig,
    PolicyGradientConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)

__all__ = [
    "BreadMethod",
    "ChordMethod",
    "Config",
    "CriticOptimizerConfig",
    "DataConfig",
    "EvaluationConfig",
    "FreezeControlConfig",
    "GrpoMethod",
    "GuardConfig",
    "HptMethod",
    "ImitationConfig",
    "IntervalRejuvenationConfig",
    "LegacyConfig",
    "LuffyMethod",
    "MethodConfig",
    "MifoMethod",
    "ModelConfig",
    "MultiStageMethod",
    "OptimizerConfig",
    "PolicyGradientConfig",
    "PpoMethod",
    "PrefixRftMethod",
    "PrimeMethod",
    "PrmOptimizerConfig",
    "RejuvenationConfig",
    "ReliftMethod",
    "RewardConfig",
    "RlSftMethod",
    "RlWithSftMethod",
    "RolloutConfig",
    "RunConfig",
    "SasrMethod",
    "ScorerConfig",
    "SftMethod",
    "SftRlMethod",
    "SrftMethod",
    "StageConfig",
    "SuperRlMethod",
    "TrainConfig",
    "UftMethod",
]


REJUVENATE = "rejuvenate"  # what a stage that trains nothing is called beside the methods of others


@dataclass(frozen=True, kw_only=True)
class GrpoMethod:
    """RL alone: GRPO with its switches."""

    name: Literal["grpo"] = "grpo"
    """Tag of this method."""
    rl: PolicyGradientConfig = field(default_factory=PolicyGradientConfig)
    """The policy gradient."""


@dataclass(frozen=True, kw_only=True)
class SftMethod:
    """SFT alone, on the demonstrations of the training data in shuffled epochs."""

    name: Literal["sft"] = "sft"
    """Tag of this method."""
    sft: ImitationConfig = field(default_factory=ImitationConfig)
    """The imitation loss."""
    batch_size: Count = 64
    """Demonstrations in one update."""
    token_fraction: PositiveShare = 1.0
    """ρ: share of each response's tokens, highest entropy first, that is learned."""


@dataclass(frozen=True, kw_only=True)
class MifoMethod:
    """MIFO: RL→SFT intervals with entropy selection (ES) and parameter freezing (PF), Algorithm 1 of the paper.

    Plain interleaving is `token_fraction = 1, freeze_top = 0`; +ES is `0.2, 0`; +PF is `1, 0.5`.
    """

    name: Literal["mifo"] = "mifo"
    """Tag of this method."""
    rl: PolicyGradientConfig = field(default_factory=PolicyGradientConfig)
    """The policy gradient of the RL phases."""
    scorer: ScorerConfig | None = None
    """RL with a second model, which gives the advantages: the settings of `ppo` or `prime` but `rl`; none: groups give them."""
    sft: ImitationConfig = field(default_factory=ImitationConfig)
    """The imitation loss of the SFT phases."""
    accuracy_threshold: Share = 0.125
    """p: a question with rollout accuracy ≤ p gives its demonstration to the buffer."""
    buffer_size: Count = 64
    """S: the RL phase ends with the first step after which the buffer holds at least this many."""
    buffer_order: Literal["fifo", "lifo"] = "fifo"
    """Which demonstrations an SFT phase learns first (ReLIFT's code is lifo)."""
    sft_batch_size: Count | None = None
    """Demonstrations in one SFT update; none: the whole buffer in one update."""
    token_fraction: PositiveShare = 0.2
    """ρ: share of each demonstration's tokens, highest entropy first, that is learned."""
    token_denominator: Literal["all", "kept"] = "all"
    """Divide by all response tokens (the paper's 1/|s|) or only by those kept."""
    freeze_top: Share = 0.5
    """k: share of all trainable elements, those RL moved most, that SFT must not move."""
    history: ShareBelowOne = 0.5
    """α: weight of earlier intervals in the importance map; 0 is MIFO†."""
    freeze: Literal["hard", "grad_zero"] = "hard"
    """hard keeps the bits of frozen elements; grad_zero only zeroes gradients, as printed in the paper."""
    freeze_scope: Literal["global", "tensor"] = "global"
    """Rank all elements together, or take the share of every tensor."""
    fill_ties: bool = False
    """Freeze also elements that RL never moved, when fewer than k moved."""
    optimizers: Literal["separate", "shared"] = "separate"
    """Own moments for SFT, or RL's."""
    control: FreezeControlConfig = field(default_factory=FreezeControlConfig)
    """Steering of k, and of ρ, by the forgetting meter."""


@dataclass(frozen=True, kw_only=True)
class ReliftMethod:
    """ReLIFT: RL, and an SFT step on failed questions whenever enough of them wait."""

    name: Literal["relift"] = "relift"
    """Tag of this method."""
    rl: PolicyGradientConfig = field(default_factory=PolicyGradientConfig)
    """The policy gradient of the RL steps."""
    scorer: ScorerConfig | None = None
    """RL with a second model, which gives the advantages: the settings of `ppo` or `prime` but `rl`; none: groups give them."""
    sft: ImitationConfig = field(default_factory=ImitationConfig)
    """The imitation loss of the SFT steps."""
    accuracy_threshold: Share = 0.0
    """A question with rollout accuracy at most this gives its demonstration to the buffer."""
    buffer_size: Count = 128
    """S: an SFT step follows the RL step after which at least this many wait, and learns so many of them."""
    buffer_order: Literal["fifo", "lifo"] = "fifo"
    """Which wait least: fifo learns the oldest first, lifo the newest (the authors' code)."""


@dataclass(frozen=True, kw_only=True)
class LuffyMethod:
    """LUFFY: a demonstration in every group, with a shaped off-policy gradient and a shared baseline."""

    name: Literal["luffy"] = "luffy"
    """Tag of this method."""
    rl: PolicyGradientConfig = field(default_factory=PolicyGradientConfig)
    """The policy gradient; rollouts_per_prompt counts the demonstration, so one less is sampled."""
    gamma: Positive | None = 0.1
    """γ of the shaping p/(p+γ) on demonstrations; none: p as it is."""


@dataclass(frozen=True, kw_only=True)
class RlWithSftMethod:
    """RL with SFT loss: policy gradient of the rollouts plus the cross-entropy of the demonstration, in one update."""

    name: Literal["rl_with_sft"] = "rl_with_sft"
    """Tag of this method."""
    rl: PolicyGradientConfig = field(default_factory=PolicyGradientConfig)
    """The policy gradient; rollouts_per_prompt counts the demonstration, so one less is sampled."""
    sft: ImitationConfig = field(default_factory=ImitationConfig)
    """The imitation loss."""
    sft_coefficient: Positive = 1.0
    """λ: weight of the imitation loss."""


@dataclass(frozen=True, kw_only=True)
class SftRlMethod:
    """SFT→RL: some SFT steps, then RL to the end, each with its own optimizer."""

    name: Literal["sft_rl"] = "sft_rl"
    """Tag of this method."""
    rl: PolicyGradientConfig = field(default_factory=PolicyGradientConfig)
    """The policy gradient."""
    scorer: ScorerConfig | None = None
    """RL with a second model, which gives the advantages: the settings of `ppo` or `prime` but `rl`; none: groups give them."""
    sft: ImitationConfig = field(default_factory=ImitationConfig)
    """The imitation loss."""
    sft_steps: Count = 250
    """SFT steps of train.steps; the others are RL."""
    sft_batch_size: Count = 64
    """Demonstrations in one SFT step."""


@dataclass(frozen=True, kw_only=True)
class RlSftMethod:
    """RL→SFT: some RL steps, then SFT to the end (the paper's forgetting probe)."""

    name: Literal["rl_sft"] = "rl_sft"
    """Tag of this method."""
    rl: PolicyGradientConfig = field(default_factory=PolicyGradientConfig)
    """The policy gradient."""
    scorer: ScorerConfig | None = None
    """RL with a second model, which gives the advantages: the settings of `ppo` or `prime` but `rl`; none: groups give them."""
    sft: ImitationConfig = field(default_factory=ImitationConfig)
    """The imitation loss."""
    rl_steps: Count = 50
    """RL steps of train.steps; the others are SFT."""
    sft_batch_size: Count = 64
    """Demonstrations in one SFT step."""


@dataclass(frozen=True, kw_only=True)
class MultiStageMethod:
    """SFT and RL in turn, a fixed number of steps each; an optimizer starts anew with its stage."""

    name: Literal["multi_stage"] = "multi_stage"
    """Tag of this method."""
    rl: PolicyGradientConfig = field(default_factory=PolicyGradientConfig)
    """The policy gradient."""
    scorer: ScorerConfig | None = None
    """RL with a second model, which gives the advantages: the settings of `ppo` or `prime` but `rl`; none: groups give them."""
    sft: ImitationConfig = field(default_factory=ImitationConfig)
    """The imitation loss."""
    sft_steps: Count = 125
    """SFT steps of a cycle."""
    rl_steps: Count = 125
    """RL steps of a cycle; K cycles take train.steps = K·(sft_steps + rl_steps)."""
    sft_batch_size: Count = 64
    """Demonstrations in one SFT step."""


MethodConfig = (
    MifoMethod
    | GrpoMethod
    | SftMethod
    | SftRlMethod
    | RlSftMethod
    | MultiStageMethod
    | ReliftMethod
    | LuffyMethod
    | RlWithSftMethod
    | SrftMethod
    | HptMethod
    | SuperRlMethod
    | ChordMethod
    | UftMethod
    | PrefixRftMethod
    | BreadMethod
    | SasrMethod
    | PpoMethod
    | PrimeMethod
)


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """One stage of a run that goes through several methods; what it leaves out is as in the tables of the whole run.

    A stage with a `rejuvenate` table trains nothing: it has no method, steps or optimizers, and stands before one that does.
    """

    method: MethodConfig = field(default_factory=MifoMethod)
    """The method, as [method]; settings of the run's own [method] hold where it is of the same name."""
    steps: Count = 500
    """Steps of this stage, counted as train.steps."""
    rl_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """As [rl_optimizer]; it starts without moments."""
    sft_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """As [sft_optimizer]; it starts without moments."""
    rejuvenate: RejuvenationConfig | None = None
    """Rejuvenate the weights before the next stage: settings of [rejuvenation] but `every_intervals`; none: train."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    method: MethodConfig = field(default_factory=MifoMethod)
    legacy: LegacyConfig = field(default_factory=LegacyConfig)
    rl_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sft_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    critic_optimizer: CriticOptimizerConfig = field(default_factory=CriticOptimizerConfig)
    prm_optimizer: PrmOptimizerConfig = field(default_factory=PrmOptimizerConfig)
    rejuvenation: IntervalRejuvenationConfig = field(default_factory=IntervalRejuvenationConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    run: RunConfig = field(default_factory=RunConfig)
    stages: tuple[StageConfig, ...] = ()
    """Methods that the run goes through, one after another, in place of [method]."""

    @property
    def by_stage(self) -> tuple[Config, ...]:
        """The configuration of each stage that trains; a run without stages is its own only one."""
        if not self.stages:
            return (self,)
        return tuple(
            replace(
                self,
                method=stage.method,
                rl_optimizer=stage.rl_optimizer,
                sft_optimizer=stage.sft_optimizer,
                train=replace(self.train, steps=stage.steps),
                stages=(),
            )
            for stage in self.stages
            if stage.rejuvenate is None
        )

    @property
    def stage_numbers(self) -> tuple[int, ...]:
        """Where the stages of `by_stage` stand in the list, counted from 1."""
        return tuple(i for i, stage in enumerate(self.stages, 1) if stage.rejuvenate is None) or (1,)

    @property
    def rejuvenation_before(self) -> tuple[RejuvenationConfig | None, ...]:
        """The rejuvenation that stands right before each stage of `by_stage`."""
        before = (None, *(stage.rejuvenate for stage in self.stages))
        return tuple(before[number - 1] for number in self.stage_numbers)

    @property
    def rejuvenations(self) -> tuple[RejuvenationConfig, ...]:
        """All that a run does, stages first; () for a run without."""
        between = (self.rejuvenation,) if self.rejuvenation.every_intervals is not None else ()
        return (*(before for before in self.rejuvenation_before if before is not None), *between)

    @property
    def steps(self) -> int:
        """Steps of all stages."""
        return sum(config.train.steps for config in self.by_stage)

    @property
    def method_name(self) -> str:
        """The method, or those of all stages in their order."""
        names = (REJUVENATE if stage.rejuvenate is not None else stage.method.name for stage in self.stages)
        return " → ".join(names) or self.method.name

    @property
    def evaluation_tokens(self) -> int:
        """Longest response of an evaluation."""
        return self.evaluation.max_response_tokens or self.rollout.max_response_tokens
