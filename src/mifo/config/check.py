"""Settings that cannot work together, found before anything is loaded."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mifo.config.check_imitation import check_imitation
from mifo.config.check_legacy import check_legacy
from mifo.config.check_mixed import check_mixed, imitation_batch
from mifo.config.check_phases import check_control
from mifo.config.check_prefix import check_prefix
from mifo.config.check_rejuvenation import check_rejuvenation
from mifo.config.check_scored import check_scored, check_second_models, second_model
from mifo.config.decode import check_bounds, numbered
from mifo.config.schema import (
    BreadMethod,
    Config,
    GrpoMethod,
    LuffyMethod,
    MifoMethod,
    OptimizerConfig,
    PolicyGradientConfig,
    PpoMethod,
    PrefixRftMethod,
    PrimeMethod,
    RunConfig,
    SftMethod,
    SrftMethod,
    TrainConfig,
)
from mifo.config.scored import CriticSettings
from mifo.errors import ConfigError

MOST_THREADS = 1024
LONGEST_STOP_TEXT = 64

UNIMITATED = (
    MifoMethod, GrpoMethod, LuffyMethod, PrefixRftMethod, BreadMethod, PpoMethod, PrimeMethod,
)  # fmt: skip
"""Methods without a batch of demonstrations of their own that a loss is checked against here."""


def check_config(config: Config) -> None:
    """Check ranges and combinations.

    Raises:
        ConfigError: names the fields, their values, the reason and the remedy.
    """
    check_bounds(config)
    check_rejuvenation(config)
    check_second_models(config)
    for number, stage in zip(config.stage_numbers, config.by_stage, strict=True):
        try:
            _check(stage)
        except ConfigError as error:
            if not config.stages:
                raise
            raise ConfigError(f"in {numbered('stages', number - 1)}: {error}") from error


def _check(config: Config) -> None:
    """The checks of a run of one method."""
    _check_model(config)
    _check_data(config)
    _check_evaluation(config)
    _check_stop_texts(config.rollout.stop_texts)
    for name in ("rl_optimizer", "sft_optimizer", "critic_optimizer", "prm_optimizer"):
        _check_optimizer(name, getattr(config, name))
    _check_reward(config)
    _check_run(config.run)
    _check_train(config.train)
    method = config.method
    if not isinstance(method, SftMethod | SrftMethod):
        _check_policy_gradient(method.rl, config)
    if isinstance(method, SftMethod):
        check_imitation(method.sft, method.batch_size, config)
    elif not isinstance(method, UNIMITATED):
        check_imitation(method.sft, imitation_batch(method), config)
    if isinstance(method, MifoMethod):
        check_imitation(method.sft, method.sft_batch_size or method.buffer_size, config)
        _check_mifo(method, config)
        check_control(method, config)
    check_mixed(config)
    check_prefix(config)
    check_legacy(config)
    check_scored(config)


def _check_stop_texts(texts: Sequence[str]) -> None:
    for text in texts:
        if not text or len(text) > LONGEST_STOP_TEXT:
            raise ConfigError(
                f"rollout.stop_texts holds {text[:LONGEST_STOP_TEXT]!r} of {len(text)} characters: give texts of 1 to "
                f"{LONGEST_STOP_TEXT}, such as '</answer>'."
            )


def _check_reward(config: Config) -> None:
    reward = config.reward
    for name, value in (("correct", reward.correct), ("incorrect", reward.incorrect), ("truncated", reward.truncated)):
        if value is not None and not math.isfinite(value):
            raise ConfigError(
                f"reward.{name} = {value}: a reward must be a finite number. The usual values are 1 and 0."
            )
    if reward.correct <= reward.incorrect:
        raise ConfigError(
            f"reward.correct = {reward.correct:g} must be above reward.incorrect = {reward.incorrect:g}: "
            "otherwise there is nothing to learn. The usual values are 1 and 0."
        )
    if reward.truncated is not None and reward.truncated >= reward.correct:
        raise ConfigError(
            f"reward.truncated = {reward.truncated:g} must be below reward.correct = {reward.correct:g}: a response that is "
            "cut off would be worth as much as an answer. Oat-Zero takes 0."
        )
    if reward.truncated is not None and isinstance(config.method, SftMethod):
        raise ConfigError(
            f"reward.truncated = {reward.truncated:g} has no effect with method.name = 'sft', which samples nothing. Leave it "
            "out."
        )
    if reward.max_failure_share * reward.failure_window < 1:
        raise ConfigError(
            f"reward.max_failure_share = {reward.max_failure_share:g} of reward.failure_window = {reward.failure_window} answers "
            "is less than one answer: a single undecided one would stop the run. Raise one of them."
        )


def _check_model(config: Config) -> None:
    model = config.model
    if model.path in ("tiny", "mini", "smollm2-135m-instruct") and model.revision is not None:
        raise ConfigError(
            f"model.revision = '{model.revision}' has no effect with model.path = '{model.path}'. Leave it out, or name a hub id."
        )
    for name, value in (("rope_theta", model.rope_theta), ("context", model.context)):
        if model.path == "tiny" and value is not None:
            raise ConfigError(
                f"model.{name} = {value:g} has no effect with model.path = 'tiny', made as it is. Leave it out."
            )


def _check_data(config: Config) -> None:
    data = config.data
    embedded = data.train.startswith("embedded")
    if embedded and not data.verify_demonstrations:
        raise ConfigError(
            "data.verify_demonstrations = false with embedded data: they are always verified. Leave it true."
        )
    _check_labels(config)
    if embedded and data.box_answers:
        raise ConfigError(
            "data.box_answers = true with embedded data: their answers are boxed already. Leave it false."
        )


def _check_labels(config: Config) -> None:
    data = config.data
    if not data.labels:
        if data.instruction is not None:
            raise ConfigError(
                "data.instruction without data.labels has no effect: it is the question about a labelled text. Name the labels "
                "too, or leave it out."
            )
        return
    if data.train.startswith("embedded"):
        raise ConfigError(
            f"data.labels with data.train = '{data.train}': embedded problems have no labels. Name a file."
        )
    if data.evaluation.startswith("embedded"):
        raise ConfigError(
            f"data.labels with data.evaluation = '{data.evaluation}': embedded problems have no labels. Name a file, or none."
        )
    if data.box_answers:
        raise ConfigError("data.box_answers = true with data.labels: a label stands alone. Leave it false.")
    if len(data.labels) < 2 or len({label.casefold() for label in data.labels}) < len(data.labels):
        raise ConfigError(f"data.labels = {list(data.labels)}: give two or more different labels.")
    if data.instruction is not None and "{text}" not in data.instruction:
        raise ConfigError(
            f"data.instruction = '{data.instruction}': it has no place for the text. Write {{text}} where it goes."
        )


def _check_evaluation(config: Config) -> None:
    evaluation = config.evaluation
    if config.data.evaluation == "none" and evaluation.every_steps is not None:
        raise ConfigError(
            f"evaluation.every_steps = {evaluation.every_steps} with data.evaluation = 'none': there is nothing to "
            "evaluate. Name held-out problems or set evaluation.every_steps to none."
        )
    if evaluation.every_flops is not None:
        _check_every_flops(evaluation.every_flops, config)
    if evaluation.meter_problems is not None and not evaluation.around_sft:
        raise ConfigError(
            f"evaluation.meter_problems = {evaluation.meter_problems} has no effect with evaluation.around_sft = false: there "
            "is no forgetting meter. Leave one of them out."
        )
    held_out = config.data.evaluation_problems
    if evaluation.meter_problems is not None and held_out is not None and evaluation.meter_problems > held_out:
        raise ConfigError(
            f"evaluation.meter_problems = {evaluation.meter_problems} exceeds data.evaluation_problems = {held_out}. Lower the "
            "first, raise the second, or leave meter_problems out to measure on all of them."
        )
    if evaluation.samples > 1 and evaluation.temperature == 0.0:
        raise ConfigError(
            f"evaluation.samples = {evaluation.samples} with evaluation.temperature = 0: greedy responses are all equal. "
            "Use 1 sample, or a temperature such as 0.6."
        )


def _check_every_flops(every: float, config: Config) -> None:
    if config.data.evaluation == "none":
        raise ConfigError(
            f"evaluation.every_flops = {every:g} with data.evaluation = 'none': there is nothing to evaluate. Name held-out "
            "problems or set evaluation.every_flops to none."
        )
    if config.evaluation.every_steps is not None:
        raise ConfigError(
            f"evaluation.every_flops = {every:g} and evaluation.every_steps = {config.evaluation.every_steps} would measure some "
            "weights twice. Set one of them to none."
        )
    budget = config.train.max_flops
    if budget is not None and every >= budget:
        raise ConfigError(
            f"evaluation.every_flops = {every:g} has no effect with train.max_flops = {budget:g}: the run ends before it, and is "
            "measured then anyway. Lower it, or leave it out."
        )


def _check_run(run: RunConfig) -> None:
    if run.name is not None and (run.name in ("", ".", "..") or "/" in run.name or "\\" in run.name):
        raise ConfigError(
            f"run.name = '{run.name}' is no name of one folder: it would leave run.folder = '{run.folder}'. Give a name without "
            "slashes, and another run.folder if the run belongs elsewhere."
        )
    if run.keep_every is None:
        return
    if run.checkpoint_steps is None or run.keep_every % run.checkpoint_steps:
        raise ConfigError(
            f"run.keep_every = {run.keep_every} is no multiple of run.checkpoint_steps = {run.checkpoint_steps}, so it would "
            "not be met as written. Choose a multiple."
        )


def _check_train(train: TrainConfig) -> None:
    if train.threads is not None and train.threads > MOST_THREADS:
        raise ConfigError(
            f"train.threads = {train.threads} exceeds {MOST_THREADS}: no machine gains from so many. Leave it out for all cores."
        )


def _check_optimizer(name: str, optimizer: OptimizerConfig) -> None:
    if optimizer.learning_rate > 1.0:
        raise ConfigError(
            f"{name}.learning_rate = {optimizer.learning_rate:g} exceeds 1: AdamW moves every element by about the rate at each "
            "update. Rates of training are between 1e-7 and 1e-2."
        )
    if optimizer.schedule != "constant" and optimizer.decay_updates is None:
        raise ConfigError(
            f"{name}.schedule = '{optimizer.schedule}' needs {name}.decay_updates: after how many updates the rate is lowest."
        )
    if optimizer.schedule == "constant" and optimizer.minimum_ratio != OptimizerConfig.minimum_ratio:
        raise ConfigError(
            f"{name}.minimum_ratio = {optimizer.minimum_ratio:g} has no effect with {name}.schedule = 'constant'. Set the "
            "schedule to 'linear' or 'cosine', or leave minimum_ratio out."
        )
    if optimizer.decay_updates is not None and optimizer.decay_updates <= optimizer.warmup_updates:
        raise ConfigError(
            f"{name}.decay_updates = {optimizer.decay_updates} must exceed {name}.warmup_updates = {optimizer.warmup_updates}."
        )


def _check_policy_gradient(rl: PolicyGradientConfig, config: Config) -> None:
    if rl.rollouts_per_prompt < 2 and not isinstance(second_model(config.method), CriticSettings):
        raise ConfigError(
            "method.rl.rollouts_per_prompt = 1 leaves a group without a baseline: every advantage would be the raw reward. "
            "Use at least 2."
        )
    if rl.prompts_per_step % rl.updates_per_step:
        raise ConfigError(
            f"method.rl.prompts_per_step = {rl.prompts_per_step} does not divide into method.rl.updates_per_step = "
            f"{rl.updates_per_step} equal updates. Choose a divisor."
        )
    if rl.constant_tokens is not None and rl.normalizer != "constant":
        raise ConfigError(
            f"method.rl.constant_tokens = {rl.constant_tokens} has no effect with method.rl.normalizer = '{rl.normalizer}'. "
            "Set the normalizer to 'constant' or leave constant_tokens out."
        )
    if rl.clip_low is not None and rl.clip_low >= 1.0:
        raise ConfigError(f"method.rl.clip_low = {rl.clip_low:g} must be below 1: the ratio is never negative.")
    if rl.dual_clip is not None and rl.dual_clip <= 1.0:
        raise ConfigError(f"method.rl.dual_clip = {rl.dual_clip:g} must exceed 1, or it clips unmoved policies.")
    _check_estimator(rl)
    _check_overlong(rl, config.rollout.max_response_tokens)
    _check_dynamic_sampling(rl)
    plain = config.rollout.temperature == 1.0 and config.rollout.top_p == 1.0
    if rl.importance_cap is not None and not plain:
        raise ConfigError(
            f"method.rl.importance_cap = {rl.importance_cap:g} compares log-probs of sampler and trainer, but with "
            f"rollout.temperature = {config.rollout.temperature:g} and rollout.top_p = {config.rollout.top_p:g} the "
            "sampler's are those of another distribution. Use 1 for both, or leave importance_cap out."
        )
    if config.train.micro_batch_tokens < 2:
        raise ConfigError(
            "train.micro_batch_tokens = 1 cannot hold a prompt and a response. Use at least a few hundred."
        )


def _check_estimator(rl: PolicyGradientConfig) -> None:
    if rl.advantage_std and rl.advantage != "group":
        raise ConfigError(
            f"method.rl.advantage_std = true has no effect with method.rl.advantage = '{rl.advantage}', which has its own "
            "scale. Leave it false, or use 'group'."
        )
    if rl.clip == "weight" and rl.dual_clip is not None:
        raise ConfigError(
            f"method.rl.dual_clip = {rl.dual_clip:g} has no effect with method.rl.clip = 'weight': the weight is bounded "
            "for both signs. Leave dual_clip out."
        )


def _check_overlong(rl: PolicyGradientConfig, longest: int) -> None:
    if rl.overlong_tokens is None:
        if rl.overlong_penalty != PolicyGradientConfig.overlong_penalty:
            raise ConfigError(
                f"method.rl.overlong_penalty = {rl.overlong_penalty:g} has no effect without method.rl.overlong_tokens. "
                "Set it, or leave overlong_penalty out."
            )
    elif rl.overlong_tokens >= longest:
        raise ConfigError(
            f"method.rl.overlong_tokens = {rl.overlong_tokens} with rollout.max_response_tokens = {longest} would lower "
            "the reward of every response. Use a part of it, such as a fifth (DAPO)."
        )


def _check_dynamic_sampling(rl: PolicyGradientConfig) -> None:
    default = PolicyGradientConfig()
    if not rl.dynamic_sampling:
        for name in ("dynamic_prompts", "dynamic_rounds"):
            if getattr(rl, name) != getattr(default, name):
                raise ConfigError(
                    f"method.rl.{name} = {getattr(rl, name)} has no effect with method.rl.dynamic_sampling = false. Leave "
                    "it out, or set dynamic_sampling to true."
                )
        return
    most = (rl.dynamic_prompts or rl.prompts_per_step) * rl.dynamic_rounds
    if most < rl.prompts_per_step:
        raise ConfigError(
            f"method.rl.dynamic_prompts = {rl.dynamic_prompts} in method.rl.dynamic_rounds = {rl.dynamic_rounds} are "
            f"{most} questions, fewer than method.rl.prompts_per_step = {rl.prompts_per_step}: a step could never fill. "
            "Raise one of them."
        )


def _check_mifo(method: MifoMethod, config: Config) -> None:
    if method.buffer_order == "lifo" and method.sft_batch_size is None:
        raise ConfigError(
            "method.buffer_order = 'lifo' has no effect with method.sft_batch_size = none: one update takes the whole buffer. "
            "Set sft_batch_size, or leave buffer_order out."
        )
    if method.sft_batch_size is not None and method.sft_batch_size > method.buffer_size:
        raise ConfigError(
            f"method.sft_batch_size = {method.sft_batch_size} exceeds method.buffer_size = {method.buffer_size}: an update "
            "would never fill. Lower it, or use none for the whole buffer in one update."
        )
    if method.token_denominator == "kept" and method.token_fraction == 1.0 and method.control.token_gain == 0.0:
        raise ConfigError("method.token_denominator = 'kept' has no effect with method.token_fraction = 1. Use 'all'.")
    if method.fill_ties and method.freeze_top == 0.0 and method.control.target_drop is None:
        raise ConfigError("method.fill_ties = true has no effect with method.freeze_top = 0. Leave it false.")
    if method.optimizers == "shared" and config.sft_optimizer != config.rl_optimizer:
        raise ConfigError(
            "method.optimizers = 'shared' uses rl_optimizer in both phases, but sft_optimizer differs from it and would be "
            "ignored. Give both tables the same values, or use 'separate'."
        )
