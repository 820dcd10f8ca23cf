"""Settings that cannot work together in methods whose rollouts begin inside a demonstration, and in SASR."""

from __future__ import annotations

from mifo.config.method_tables import BreadMethod, PrefixRftMethod, SasrMethod, UftMethod
from mifo.config.schema import Config
from mifo.errors import ConfigError


def check_prefix(config: Config) -> None:
    """Check the combinations of a method's own settings with each other and with the run's.

    Raises:
        ConfigError: names the fields, their values, the reason and the remedy.
    """
    method = config.method
    if isinstance(method, UftMethod | PrefixRftMethod | BreadMethod):
        _check_continuations(method, config)
    if isinstance(method, UftMethod):
        _check_uft(method)
    if isinstance(method, PrefixRftMethod):
        _check_prefix_rft(method)
    if isinstance(method, BreadMethod) and method.success_high <= method.success_low:
        raise ConfigError(
            f"method.success_high = {method.success_high:g} is not above method.success_low = {method.success_low:g}, so no "
            "group could be in between. Raise success_high, or lower success_low."
        )
    if isinstance(method, SasrMethod) and method.warmup_steps >= config.train.steps:
        raise ConfigError(
            f"method.warmup_steps = {method.warmup_steps} leaves nothing of train.steps = {config.train.steps} for RL. Lower "
            "warmup_steps, or raise train.steps, which counts both."
        )


def _check_continuations(method: UftMethod | PrefixRftMethod | BreadMethod, config: Config) -> None:
    if method.rl.dynamic_sampling:
        raise ConfigError(
            f"method.rl.dynamic_sampling = true with method.name = '{method.name}': groups that it drops are those that "
            "demonstrations are for. Leave it false."
        )
    if config.rollout.max_response_tokens < 2:
        raise ConfigError(
            f"rollout.max_response_tokens = 1 with method.name = '{method.name}' leaves no room for a demonstration's first "
            "token and one that continues it. Raise it."
        )


def _check_uft(method: UftMethod) -> None:
    default = UftMethod()
    if method.sft.updates_per_batch > 1:
        raise ConfigError(
            f"method.sft.updates_per_batch = {method.sft.updates_per_batch} has no effect with method.name = 'uft': hints take "
            "part in RL's updates. Use method.rl.updates_per_step."
        )
    if method.hint_coefficient == 0.0 and method.sft != default.sft:
        raise ConfigError(
            "method.sft has no effect with method.hint_coefficient = 0: hints are not learned. Leave the table out, or raise "
            "hint_coefficient."
        )
    unused = {"binomial": (), "stage": ("hint_high", "hint_low"), "uniform": ("hint_high", "hint_low", "hint_steps")}
    for name in unused[method.hints]:
        if getattr(method, name) != getattr(default, name):
            raise ConfigError(
                f"method.{name} = {getattr(method, name):g} has no effect with method.hints = '{method.hints}'. Leave it out."
            )
    if method.hints == "stage" and method.hint_steps <= method.hint_chunks:
        raise ConfigError(
            f"method.hint_steps = {method.hint_steps} is too short for the {method.hint_chunks + 1} stages of "
            f"method.hint_chunks = {method.hint_chunks}. Use at least {method.hint_chunks + 1}."
        )
    if method.hint_low > method.hint_high:
        raise ConfigError(
            f"method.hint_low = {method.hint_low:g} exceeds method.hint_high = {method.hint_high:g}, but hints become shorter. "
            "Exchange them."
        )


def _check_prefix_rft(method: PrefixRftMethod) -> None:
    rl = method.rl
    if rl.advantage != "group" or rl.overlong_tokens is not None:
        raise ConfigError(
            f"method.rl.advantage = '{rl.advantage}' and method.rl.overlong_tokens = {rl.overlong_tokens} with method.name = "
            "'prefix_rft', whose baseline is method.advantage. Leave them out."
        )
    if method.advantage != "shared":
        if rl.advantage_std:
            raise ConfigError(
                f"method.rl.advantage_std = true has no effect with method.advantage = '{method.advantage}'. Leave it false, or "
                "use 'shared'."
            )
        if rl.rollouts_per_prompt < 3:
            raise ConfigError(
                f"method.rl.rollouts_per_prompt = {rl.rollouts_per_prompt} counts the hybrid, so one plain response has no "
                f"baseline with method.advantage = '{method.advantage}'. Use at least 3."
            )
    if not method.prefix_low_end <= method.prefix_low_start <= method.prefix_high:
        raise ConfigError(
            f"method.prefix_low_end = {method.prefix_low_end:g}, method.prefix_low_start = {method.prefix_low_start:g} and "
            f"method.prefix_high = {method.prefix_high:g} must not fall in this order: the shortest prefix becomes shorter, and "
            "is never longer than the longest. Exchange them."
        )
    if method.entropy_span == "continuation" and rl.entropy_coefficient == 0.0:
        raise ConfigError(
            "method.entropy_span = 'continuation' has no effect with method.rl.entropy_coefficient = 0. Leave it out."
        )
