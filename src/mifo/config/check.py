"""Settings that cannot work together, found before anything is loaded."""

from __future__ import annotations

import math

from mifo.config.decode import check_bounds
from mifo.config.schema import Config, GrpoMethod, MifoMethod, OptimizerConfig, PolicyGradientConfig, SftMethod
from mifo.errors import ConfigError


def check_config(config: Config) -> None:
    """Check ranges and combinations.

    Raises:
        ConfigError: names the fields, their values, the reason and the remedy.
    """
    check_bounds(config)
    for name, optimizer in (("rl_optimizer", config.rl_optimizer), ("sft_optimizer", config.sft_optimizer)):
        _check_optimizer(name, optimizer)
    if not math.isfinite(config.reward.correct) or config.reward.correct <= config.reward.incorrect:
        raise ConfigError(
            f"reward.correct = {config.reward.correct:g} must be finite and above reward.incorrect = "
            f"{config.reward.incorrect:g}: otherwise there is nothing to learn."
        )
    if config.data.evaluation == "none" and config.evaluation.every_steps is not None:
        raise ConfigError(
            f"evaluation.every_steps = {config.evaluation.every_steps} with data.evaluation = 'none': there is nothing to "
            "evaluate. Name held-out problems or set evaluation.every_steps to none."
        )
    method = config.method
    if isinstance(method, MifoMethod | GrpoMethod):
        _check_policy_gradient(method.rl, config)
    if (
        isinstance(method, MifoMethod | SftMethod)
        and not config.data.verify_demonstrations
        and config.data.train == "embedded"
    ):
        raise ConfigError(
            "data.verify_demonstrations = false with embedded data: they are always verified. Leave it true."
        )
    if isinstance(method, MifoMethod):
        _check_mifo(method, config)


def _check_optimizer(name: str, optimizer: OptimizerConfig) -> None:
    if optimizer.schedule != "constant" and optimizer.decay_updates is None:
        raise ConfigError(
            f"{name}.schedule = '{optimizer.schedule}' needs {name}.decay_updates: after how many updates the rate is lowest."
        )
    if optimizer.decay_updates is not None and optimizer.decay_updates <= optimizer.warmup_updates:
        raise ConfigError(
            f"{name}.decay_updates = {optimizer.decay_updates} must exceed {name}.warmup_updates = {optimizer.warmup_updates}."
        )


def _check_policy_gradient(rl: PolicyGradientConfig, config: Config) -> None:
    if rl.rollouts_per_prompt < 2:
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
    if config.train.micro_batch_tokens < 2:
        raise ConfigError(
            "train.micro_batch_tokens = 1 cannot hold a prompt and a response. Use at least a few hundred."
        )


def _check_mifo(method: MifoMethod, config: Config) -> None:
    if method.sft_batch_size is not None and method.sft_batch_size > method.buffer_size:
        raise ConfigError(
            f"method.sft_batch_size = {method.sft_batch_size} exceeds method.buffer_size = {method.buffer_size}: an update "
            "would never fill. Lower it, or use none for the whole buffer in one update."
        )
    if method.token_denominator == "kept" and method.token_fraction == 1.0:
        raise ConfigError("method.token_denominator = 'kept' has no effect with method.token_fraction = 1. Use 'all'.")
    if method.fill_ties and method.freeze_top == 0.0:
        raise ConfigError("method.fill_ties = true has no effect with method.freeze_top = 0. Leave it false.")
    if method.optimizers == "shared" and config.sft_optimizer != config.rl_optimizer:
        raise ConfigError(
            "method.optimizers = 'shared' uses rl_optimizer in both phases, but sft_optimizer differs from it and would be "
            "ignored. Give both tables the same values, or use 'separate'."
        )
