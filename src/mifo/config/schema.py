"""The configuration of a run: frozen dataclasses, units and scope in the names.

One `[method]` table, tagged by `name`, says which method and with which settings. Every field is checked before anything is
loaded (`config.load`), every field changes behaviour, and the resolved values are saved with the run. Defaults are the
paper's (S0 App. C, METHODS 4 and 7) unless a field says otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from mifo.config.bounds import Bounds, Count, CountOrZero, NonNegative, Positive, PositiveShare, Share, ShareBelowOne
from mifo.config.tables import (
    DataConfig,
    EvaluationConfig,
    GuardConfig,
    ModelConfig,
    RewardConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from mifo.types import NormalizerName

__all__ = [
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "GrpoMethod",
    "GuardConfig",
    "ImitationConfig",
    "MethodConfig",
    "MifoMethod",
    "ModelConfig",
    "OptimizerConfig",
    "PolicyGradientConfig",
    "RewardConfig",
    "RolloutConfig",
    "RunConfig",
    "SftMethod",
    "TrainConfig",
]


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """One AdamW."""

    learning_rate: Positive = 1e-6
    """Peak rate."""
    beta1: ShareBelowOne = 0.9
    """Decay of the first moment."""
    beta2: ShareBelowOne = 0.999
    """Decay of the second moment."""
    epsilon: Positive = 1e-8
    """Added to the root of the second moment."""
    weight_decay: NonNegative = 0.01
    """Decoupled weight decay."""
    clip_norm: Positive | None = 1.0
    """Bound on the norm of the accumulated, reduced, masked gradient; none: no bound."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the rate falls after the warm-up."""
    warmup_updates: CountOrZero = 0
    """Updates over which the rate rises linearly."""
    decay_updates: Count | None = None
    """Updates after which the rate stands at its minimum; needed by linear and cosine."""
    minimum_ratio: Share = 0.1
    """Lowest rate as a share of the peak."""


@dataclass(frozen=True, kw_only=True)
class PolicyGradientConfig:
    """GRPO and its switches. Defaults: the Dr.GRPO-like setting of the paper."""

    prompts_per_step: Count = 128
    """Questions sampled in one step."""
    rollouts_per_prompt: Count = 8
    """Responses sampled for each question (N)."""
    updates_per_step: Count = 2
    """Optimizer updates made from the rollouts of one step; the groups are split evenly between them."""
    advantage: Literal["group", "rloo", "reinforce", "reinforce_baseline"] = "group"
    """group: R − mean; rloo: R − mean of the others; reinforce: R, reinforce_baseline: R − mean, both whitened over a step."""
    advantage_std: bool = False
    """Divide advantages by the group's standard deviation (GRPO does, Dr.GRPO does not)."""
    ratio: Literal["token", "sequence"] = "token"
    """Policy ratio of each token, or of the whole response: the geometric mean of its tokens' (GSPO)."""
    clip: Literal["objective", "weight"] = "objective"
    """objective: PPO's minimum; weight: the clipped ratio as a constant in front of log π, so no token is silenced (CISPO)."""
    normalizer: NormalizerName = "token"
    """token: mean over all response tokens; sequence: mean of per-response means; constant: Σ/(|U|·L)."""
    constant_tokens: Count | None = None
    """L of the constant normaliser; none: the longest response allowed."""
    clip_low: NonNegative | None = 0.2
    """Lower clip range ε_l; none: no clipping."""
    clip_high: NonNegative | None = 0.2
    """Upper clip range ε_h; none: no clipping."""
    dual_clip: Positive | None = None
    """Bound c of the dual clip for negative advantages; none: off."""
    overlong_tokens: Count | None = None
    """c of DAPO's overlong shaping: the reward falls over the last c tokens before the longest response; none: off."""
    overlong_penalty: Positive = 1.0
    """f of overlong shaping: what a response of the greatest length loses."""
    dynamic_sampling: bool = False
    """Sample until prompts_per_step groups have both correct and other responses, and learn from those alone (DAPO)."""
    dynamic_prompts: Count | None = None
    """Questions of one round of dynamic sampling; none: prompts_per_step."""
    dynamic_rounds: Count = 10
    """Most rounds of one step; past them the step learns from the groups it has."""
    importance_cap: Annotated[float, Bounds(1.0)] | None = None
    """Weigh each token by min(π_trainer/π_sampler, cap), for a sampler that is not quite the trainer; 2 is usual, none: off."""
    kl_coefficient: NonNegative = 0.0
    """Weight of the k3 estimate of KL to the starting model; 0 needs no reference model."""
    entropy_coefficient: float = 0.001
    """Weight of the mean token entropy (the paper's 0.001)."""


@dataclass(frozen=True, kw_only=True)
class ImitationConfig:
    """SFT on demonstrations."""

    loss: Literal["cross_entropy", "dft", "gem", "psft", "asft", "eaft", "chord_phi"] = "cross_entropy"
    """What a demonstrated token costs; see docs/methods.md. Which tokens are learned is the method's token_fraction."""
    gem_beta: Positive = 0.7
    """β of GEM: temperature of the distribution that is learned from."""
    gem_weight: Literal["linear", "logsigmoid"] = "logsigmoid"
    """h of GEM; with linear and β = 1 it is cross-entropy."""
    psft_clip: NonNegative = 0.28
    """ε_h of PSFT: a token stops counting when its probability has grown by this share within a batch."""
    asft_kl: Positive = 0.05
    """λ of ASFT: weight of KL(reference‖policy) over the whole vocabulary."""
    eaft_alpha: NonNegative = 1.0
    """α of EAFT: power of the normalised entropy of the 20 largest logits; 0 is cross-entropy."""
    updates_per_batch: Count = 1
    """Optimizer updates made from one batch of demonstrations, split evenly; PSFT's old policy is the one before any of them."""
    normalizer: NormalizerName = "token"
    """How token losses are summed."""
    constant_tokens: Count | None = None
    """L of the constant normaliser; none: the longest demonstration allowed."""
    entropy_coefficient: float = 0.0
    """Weight of an entropy bonus during SFT (ReLIFT has 0.001, MIFO none)."""


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


MethodConfig = MifoMethod | GrpoMethod | SftMethod


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    method: MethodConfig = field(default_factory=MifoMethod)
    rl_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    sft_optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @property
    def evaluation_tokens(self) -> int:
        """Longest response of an evaluation."""
        return self.evaluation.max_response_tokens or self.rollout.max_response_tokens
