"""Tables of methods, continued from `config.schema`: rollouts that begin inside a demonstration, SASR, SRFT, CHORD, HPT, SuperRL.

Rules of the schema hold here too.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from mifo.config.bounds import Bounds, Count, CountOrZero, NonNegative, Positive, PositiveShare, Share, ShareBelowOne
from mifo.config.tables import ImitationConfig, PolicyGradientConfig


@dataclass(frozen=True, kw_only=True)
class UftMethod:
    """UFT: every rollout continues a hint that shrinks to nothing over the steps, and the hint is imitated a little.

    The form "r3" is `hints = "uniform", hint_coefficient = 0`.
    """

    name: Literal["uft"] = "uft"
    """Tag of this method."""
    rl: PolicyGradientConfig = field(default_factory=PolicyGradientConfig)
    """The policy gradient, of continuations."""
    sft: ImitationConfig = field(default_factory=ImitationConfig)
    """The imitation loss of hints."""
    hint_coefficient: NonNegative = 0.001
    """Weight of the imitation loss; 0 leaves hints unlearned (r3)."""
    hints: Literal["binomial", "stage", "uniform"] = "binomial"
    """Chunks of a hint: binomial with p_t, one number that falls in even stages, or uniform to the end (r3)."""
    hint_chunks: Count = 5
    """Pieces of a demonstration; one of fewer tokens has fewer."""
    hint_steps: Count = 300
    """T: steps after which there are no hints; the uniform ones go on."""
    hint_high: Share = 0.95
    """p_t at the start of its cosine; binomial hints only."""
    hint_low: Share = 0.05
    """p_t at step T; binomial hints only."""


@dataclass(frozen=True, kw_only=True)
class PrefixRftMethod:
    """Prefix-RFT: one rollout of each question continues the beginning of its demonstration, and both parts are learned."""

    name: Literal["prefix_rft"] = "prefix_rft"
    """Tag of this method."""
    rl: PolicyGradientConfig = field(default_factory=PolicyGradientConfig)
    """The policy gradient; rollouts_per_prompt counts the hybrid."""
    prefix_high: PositiveShare = 0.95
    """Longest prefix, as a share of the demonstration's tokens."""
    prefix_low_start: Share = 0.95
    """low_t at the first step: shortest prefix, as a share of the demonstration's tokens."""
    prefix_low_end: Share = 0.05
    """low_t at the end of its cosine and after."""
    prefix_decay_steps: Count = 500
    """Steps of the cosine."""
    prefix_token_fraction: PositiveShare = 0.2
    """Share of an update's prefix tokens, highest entropy first, that keep their advantage; 1 keeps all."""
    advantage: Literal["shared", "dr_grpo_prefix", "dr_grpo_prefix_v2"] = "shared"
    """shared: one mean for all N; the others: R − mean of the plain rollouts on the prefix, and R or 0 on the continuation."""
    entropy_span: Literal["response", "continuation"] = "response"
    """Where the entropy bonus acts: on all tokens, or not on prefixes."""


@dataclass(frozen=True, kw_only=True)
class BreadMethod:
    """BREAD: a question that fails is rolled out again from inside its demonstration, as far in as success takes."""

    name: Literal["bread"] = "bread"
    """Tag of this method."""
    rl: PolicyGradientConfig = field(default_factory=PolicyGradientConfig)
    """The policy gradient."""
    episodes: Annotated[int, Bounds(2)] = 10
    """K: even pieces of a demonstration, between which a prefix ends; a search takes up to log2(K) + 1 more groups."""
    success_low: ShareBelowOne = 0.0
    """A group with at most this share of correct rollouts fails and is sampled again."""
    success_high: PositiveShare = 0.8
    """A group that was sampled again is learned from if its share of correct rollouts is above success_low and at most this."""


@dataclass(frozen=True, kw_only=True)
class SasrMethod:
    """SASR: an SFT warm-up, then SFT or RL step by step, SFT the likelier the larger its gradient still is."""

    name: Literal["sasr"] = "sasr"
    """Tag of this method."""
    rl: PolicyGradientConfig = field(default_factory=PolicyGradientConfig)
    """The policy gradient; its KL term compares with the policy at the end of the warm-up."""
    sft: ImitationConfig = field(default_factory=ImitationConfig)
    """The imitation loss."""
    sft_batch_size: Count = 64
    """Demonstrations in one SFT step."""
    warmup_steps: Count = 100
    """SFT steps of the warm-up; train.steps counts them."""
    gamma: Positive = 1.0
    """γ: weight of the warm-up's gradient norm; larger means less SFT."""


@dataclass(frozen=True, kw_only=True)
class SrftMethod:
    """SRFT: demonstrations and rollouts in one stage, weighted by the policy's entropy; nothing is clipped."""

    name: Literal["srft"] = "srft"
    """Tag of this method."""
    sft: ImitationConfig = field(default_factory=ImitationConfig)
    """The imitation loss that the demonstration's weight multiplies: `loss`, its parameters and `token_fraction`."""
    prompts_per_step: Count = 128
    """Questions sampled in one step."""
    rollouts_per_prompt: Count = 8
    """Responses sampled for each question, beside its demonstration."""
    updates_per_step: Count = 2
    """Optimizer updates made from one step; the groups are split evenly between them."""
    normalizer: Literal["token", "sequence"] = "token"
    """How the tokens of each stream are averaged."""
    advantage_std: bool = True
    """Divide the demonstration's advantage by the standard deviation of rewards over rollouts and demonstration."""
    sft_scale: NonNegative = 0.5
    """Factor of the demonstration's weight e^{-H}."""
    sft_entropy_sign: Literal["minus", "plus"] = "minus"
    """Sign of H in that weight: the paper prints minus; the authors' code is reported to have plus."""
    rl_scale: NonNegative = 0.1
    """Factor of a correct rollout's weight e^{+H}."""
    entropy_scope: Literal["sequence", "token"] = "sequence"
    """H is the mean over the response, or each token's own."""
    negative_weight: NonNegative = 1.0
    """Weight of wrong rollouts: 1 in the paper's derivation, 0 with its rewards of 0 and 1."""
    gamma: Positive | None = None
    """γ of LUFFY's shaping p/(p+γ) on the demonstration's RL term; none: p as it is."""


@dataclass(frozen=True, kw_only=True)
class ChordMethod:
    """CHORD: (1−μ) RL + μ SFT on questions of their own, μ by a schedule; φ is `sft.loss = "chord_phi"`."""

    name: Literal["chord"] = "chord"
    """Tag of this method."""
    rl: PolicyGradientConfig = field(default_factory=PolicyGradientConfig)
    """The policy gradient."""
    sft: ImitationConfig = field(default_factory=ImitationConfig)
    """The imitation loss."""
    demonstrations_per_step: Count = 64
    """Questions more in each step, shown with their demonstration and not sampled."""
    mu_peak: Share = 0.5
    """μ at the end of its warm-up."""
    mu_valley: Share = 0.02
    """μ at the end of its decay and after."""
    mu_warmup_steps: CountOrZero = 200
    """Steps in which μ rises linearly from 0 to its peak."""
    mu_decay_steps: CountOrZero = 400
    """Steps in which μ falls by a cosine to its valley."""


@dataclass(frozen=True, kw_only=True)
class HptMethod:
    """HPT: a question whose rollouts mostly fail is learned from its demonstration, any other by RL."""

    name: Literal["hpt"] = "hpt"
    """Tag of this method."""
    rl: PolicyGradientConfig = field(default_factory=PolicyGradientConfig)
    """The policy gradient."""
    sft: ImitationConfig = field(default_factory=ImitationConfig)
    """The imitation loss."""
    accuracy_threshold: ShareBelowOne = 0.0
    """γ: at most this share of correct rollouts means imitation (0 for Qwen, 2/8 for Llama)."""
    sft_coefficient: Positive = 1.0
    """β: weight of the imitation loss (1; 0.3 for the 1.5B model)."""
    denominator: Literal["batch", "stream"] = "batch"
    """Average each loss over all questions of the update, or over those that it learns from."""


@dataclass(frozen=True, kw_only=True)
class SuperRlMethod:
    """SuperRL: RL for a question with any reward (or advantage), its demonstration for the others; or both, weighted."""

    name: Literal["superrl"] = "superrl"
    """Tag of this method."""
    rl: PolicyGradientConfig = field(default_factory=PolicyGradientConfig)
    """The policy gradient."""
    sft: ImitationConfig = field(default_factory=ImitationConfig)
    """The imitation loss."""
    gate: Literal["reward", "advantage", "log_sigma"] = "reward"
    """RL where a rollout has a positive reward, or a positive advantage; log_sigma: both losses of all, weighted by learned σ."""
    sigma_rate: Positive = 1e-3
    """Step of gradient descent on σ, once an update; log_sigma only."""
    sigma_bound: Annotated[float, Bounds(0.0, 10.0, open_low=True)] = 1.0
    """σ stays within ±this, so a weight within e^±2 of it; log_sigma only."""
    denominator: Literal["batch", "stream"] = "batch"
    """Average each loss over all questions of the update, or over those that it learns from."""
