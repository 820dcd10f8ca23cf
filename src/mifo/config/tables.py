"""Tables of the configuration that all methods share: model, data, rewards, rollouts, losses, optimizers, guard, run and others.

Rules of the schema (see `config.schema`) hold here too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from mifo.config.bounds import (
    Bounds,
    Count,
    CountOrZero,
    NonNegative,
    Positive,
    PositiveShare,
    Seed,
    Share,
    ShareBelowOne,
)
from mifo.types import NormalizerName


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model is trained, and how it is computed."""

    path: str = "smollm2-135m-instruct"
    """A local Hugging Face folder, a hub id, `smollm2-135m-instruct` and `mini` (embedded), or `tiny` (random, for tests)."""
    revision: str | None = None
    """Commit or tag of a hub id."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you trust it."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N. auto takes a CUDA device where there is one."""
    compute: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of forward and backward passes; master weights are always fp32. auto: bfloat16 where it is fast."""
    rope_theta: Positive | None = None
    """RoPE base, to stretch the context (the paper raises 10,000 to 40,000)."""
    context: Count | None = None
    """Longest prompt plus response in tokens; none keeps the model's own."""
    layout: Literal["auto", "packed", "padded"] = "auto"
    """Rows of a micro-batch end to end with attention per sequence, or padded. auto packs where a check agrees."""
    activation_checkpointing: bool = False
    """Trade a second forward pass for the memory of activations."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is trained on and what it is measured on."""

    train: str = "embedded"
    """`embedded`, a JSONL/parquet file, a `datasets` folder, or a hub id."""
    evaluation: str = "embedded"
    """Held-out problems: as `train`, or `embedded:ood`; `none` for no evaluation."""
    families: tuple[str, ...] = ()
    """Embedded families; empty means all that are meant for training. Other data has none."""
    levels: Count | None = None
    """Hardest level of the embedded families; none means all."""
    train_problems: Count | None = 2000
    """How many problems to generate, or the most to read from a file (none: all of it)."""
    evaluation_problems: Count | None = 200
    """The same for the held-out problems."""
    split: str = "train"
    """Split of a `datasets` folder or hub data set for training."""
    evaluation_split: str = "test"
    """Split of a `datasets` folder or hub data set for evaluation."""
    template: Literal["tokenizer", "luffy", "qwen", "prime", "none"] = "tokenizer"
    """How a problem becomes a prompt: the tokenizer's own chat template or one of the paper's Figure 8."""
    system_prompt: str | None = None
    """System turn for template `tokenizer`; none leaves the template's own."""
    max_prompt_tokens: Count = 1024
    """Longer prompts are dropped and counted."""
    max_demonstration_tokens: Count = 8192
    """Longer demonstrations are dropped and counted; their problems stay."""
    verify_demonstrations: bool = True
    """Grade every demonstration against its answer when data is read, and drop those that fail."""
    box_answers: bool = False
    """End demonstrations that have no boxed answer with the reference answer; for solutions known to be right."""
    labels: tuple[str, ...] = ()
    """Names of classes, in the order of their numbers: files are then of labelled texts (`sentence` or `text`, and `label`)."""
    instruction: str | None = None
    """The question about a labelled text, with {text} in its place; none: CoLA's for its labels, else a general one."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """How answers are graded."""

    correct: float = 1.0
    """Reward of a correct answer."""
    incorrect: float = 0.0
    """Reward of any other verdict; errors and time-outs are counted apart."""
    truncated: float | None = None
    """Reward of a response that reached rollout.max_response_tokens without an end, right or wrong; none: that of its verdict."""
    workers: Count = 1
    """Processes for answers that exact comparison cannot decide."""
    seconds_per_answer: Annotated[float, Bounds(0.01, 86_400.0)] = 5.0
    """Deadline of one answer; past it the worker is killed and the verdict is timeout."""
    worker_memory_mib: Annotated[int, Bounds(1, 2**24)] = 2048
    """Address space of a worker, and of a program that answers a coding problem."""
    max_failure_share: PositiveShare = 0.25
    """Stop the run when errors and time-outs exceed this share of the last `failure_window` answers; 1 never stops."""
    failure_window: Count = 512
    """Answers over which failures are counted; fewer answers than that count as if the others had been decided."""
    unsafe_code_execution: bool = False
    """Run answers to coding problems without a sandbox where bubblewrap is missing. They can read and delete your files."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How responses are sampled during training."""

    engine: Literal["auto", "local", "generate"] = "auto"
    """The embedded decode loop, or transformers' forward pass for other architectures. auto picks by architecture."""
    temperature: Positive = 1.0
    """Sampling temperature."""
    top_p: PositiveShare = 1.0
    """Nucleus mass; 1 samples the whole distribution."""
    max_response_tokens: Count = 8192
    """Longest response."""
    stop_texts: tuple[str, ...] = ()
    """Texts that end a response, in evaluation too, as the model's end token does; it keeps them. Looked for behind a prefix."""
    batch_rows: Count | None = None
    """Most sequences decoded at once; none: all of a step."""
    compute: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the sampler. auto: as the trainer computes."""
    gap_alarm: Positive | None = None
    """Alarm when the mean |log-prob| gap of sampler and trainer exceeds this many nats; none: 2.2 times what rounding does."""


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """What happens to updates whose numbers are not finite, or are far from the usual."""

    skips_in_a_row: Count = 3
    """Abort when so many updates of a phase in a row were skipped."""
    on_spike: Literal["warn", "skip", "rollback"] = "warn"
    """Take a step whose loss or gradient norm spikes, skip it, or skip it and undo the step before (needs a copy in memory)."""
    spike_factor: Annotated[float, Bounds(1.0, open_low=True)] = 10.0
    """A spike: a gradient norm of so many medians, or a loss so many spreads above its median."""
    spike_window: Annotated[int, Bounds(8)] = 32
    """Updates of the same phase that median and spread are taken over."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long and in what pieces."""

    steps: Count = 500
    """RL steps (SFT updates for method sft) to take."""
    minutes: Positive | None = None
    """Stop at the first step that ends after this many minutes, or keep to the number of steps (none)."""
    max_flops: Positive | None = None
    """Stop at the first step that ends with this many FLOPs spent, 2·N·D generated and 6·N·D trained (none: no bound)."""
    max_tokens: Count | None = None
    """Stop at the first step that ends with this many response tokens generated and trained on, together (none: no bound)."""
    seed: Seed = 0
    """Seed of data order, sampling and initialisation."""
    micro_batch_tokens: Count = 8192
    """Most tokens in one forward pass; the gradient does not depend on it."""
    gradient_drop: ShareBelowOne = 0.0
    """Probe: random share of gradient elements cleared at each update, before clipping, without rescaling; 0 is training."""
    threads: Count | None = None
    """CPU threads; none: all cores."""


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """When and how accuracy on held-out problems is measured."""

    every_steps: Count | None = None
    """Also measure every so many RL steps; none: only before and after training."""
    every_flops: Positive | None = None
    """Also measure at the first step that ends after each multiple of so many FLOPs; none: not by FLOPs."""
    around_sft: bool = True
    """Measure just before and just after every SFT phase: the forgetting meter."""
    meter_problems: Count | None = None
    """Problems of the forgetting meter, the first of the held-out ones; none: all of them."""
    samples: Count = 1
    """Responses for each problem; accuracy is their mean (avg@k)."""
    temperature: NonNegative = 0.0
    """0 is greedy; the paper evaluates at 0.6."""
    top_p: PositiveShare = 1.0
    """Nucleus mass."""
    max_response_tokens: Count | None = None
    """Longest response; none: as in training."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Where a run lives and what it writes."""

    folder: str = "runs"
    """Parent of run folders."""
    name: str | None = None
    """Name of the run folder; none: the recipe's name."""
    checkpoint_steps: Count | None = 25
    """Write a checkpoint every so many steps, RL and SFT alike; none: only at the end."""
    keep_checkpoints: Count = 2
    """How many of the newest checkpoints stay."""
    keep_every: Count | None = None
    """Also keep every checkpoint whose turn is a multiple of this; none: only the newest."""
    keep_phases: bool = False
    """Also keep the weights where each phase ends, and MIFO's mask, in phases/: for `mifo probe overlap RUN`."""
    background_checkpoints: bool = True
    """Write checkpoints beside training, at the cost of a copy of all state while one is written; false waits instead."""
    verify_checkpoints: bool = True
    """Compare the hash of every file of a checkpoint before resuming from it (`--no-verify` does not)."""
    lock: bool = True
    """Refuse a folder that another run is using; off only for file systems without locks."""
    samples_per_step: CountOrZero = 4
    """Rollouts written to samples.jsonl each step; of those with and without a prefix at least one each, unless it is 0."""
    export: bool = True
    """Write a plain Hugging Face folder at the end."""


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
    """Weight of the k3 estimate of KL to the model as it was loaded, or as a later stage found it; 0 needs no reference."""
    entropy_coefficient: float = 0.001
    """Weight of the mean token entropy (the paper's 0.001)."""


@dataclass(frozen=True, kw_only=True)
class ImitationConfig:
    """SFT on demonstrations."""

    loss: Literal["cross_entropy", "dft", "gem", "psft", "asft", "eaft", "chord_phi"] = "cross_entropy"
    """What a demonstrated token costs; see docs/methods.md."""
    token_fraction: PositiveShare = 1.0
    """Share of each demonstration's tokens, highest entropy first, that is learned; `mifo` and `sft` have their own."""
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
    lora_rank: Count | None = None
    """r of adapters that SFT phases train in place of the weights, and merge at their end (64 is usual); none: the weights."""
    lora_alpha: Positive = 128.0
    """α of the adapters, W x + (α/r) B A x; sft_optimizer is theirs, and wants a rate of about 1e-4."""


@dataclass(frozen=True, kw_only=True)
class FreezeControlConfig:
    """The share of frozen elements follows what SFT phases cost (docs/freezing.md)."""

    target_drop: Annotated[float, Bounds(-1.0, 1.0)] | None = None
    """Drop of accuracy over an SFT phase, as a share, that is steered to: 0.02 is two points, 0 none; none: k does not move."""
    gain: Positive = 1.0
    """What k grows by after a phase whose mean drop is a whole above the target."""
    smoothing: ShareBelowOne = 0.5
    """Weight of earlier phases in the mean drop; 0 goes by the last one alone."""
    freeze_min: Share = 0.0
    """Least k; it starts at freeze_top."""
    freeze_max: Share = 0.95
    """Greatest k."""
    token_gain: NonNegative = 0.0
    """The same for ρ, which falls where k grows; 0 leaves ρ as it is."""
    token_min: PositiveShare = 0.05
    """Least ρ; it starts at token_fraction."""
    token_max: PositiveShare = 1.0
    """Greatest ρ."""
