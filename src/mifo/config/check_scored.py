"""Settings that cannot work together in methods with a second model: PPO's critic, PRIME's reward model."""

from __future__ import annotations

from mifo.config.schema import Config, PolicyGradientConfig, PpoMethod, PrimeMethod
from mifo.errors import ConfigError

OWNERS = {"critic_optimizer": ("ppo", "critic"), "prm_optimizer": ("prime", "process reward model")}


def check_scored(config: Config) -> None:
    """Check the combinations of these methods' settings, and that no other method is given theirs.

    Raises:
        ConfigError: names the fields, their values, the reason and the remedy.
    """
    method = config.method
    for table, (owner, model) in OWNERS.items():
        if method.name != owner and getattr(config, table) != getattr(Config(), table):
            raise ConfigError(
                f"[{table}] is set, but method.name = '{method.name}' has no {model}: only '{owner}' trains one, and it cannot "
                f"be combined with SFT phases. Leave the table out, or use method.name = '{owner}'."
            )
    if isinstance(method, PpoMethod):
        _check_own_advantages(method.rl, method.name)
        _check_ppo(method, config.train.steps)
    if isinstance(method, PrimeMethod):
        _check_own_advantages(method.rl, method.name)
        _check_prime(method)


def _check_own_advantages(rl: PolicyGradientConfig, name: str) -> None:
    if rl.advantage != PolicyGradientConfig.advantage or rl.advantage_std:
        raise ConfigError(
            f"method.rl.advantage = '{rl.advantage}' and method.rl.advantage_std = {str(rl.advantage_std).lower()} with "
            f"method.name = '{name}', whose advantages are its second model's. Leave them out."
        )


def _check_updates(field: str, updates: int, rl: PolicyGradientConfig) -> None:
    rollouts = rl.prompts_per_step * rl.rollouts_per_prompt
    if updates > rollouts:
        raise ConfigError(f"method.{field} = {updates} exceeds the {rollouts} rollouts of a step. Lower it.")


def _check_ppo(method: PpoMethod, steps: int) -> None:
    _check_updates("critic_updates_per_step", method.critic_updates_per_step, method.rl)
    if method.critic_warmup_steps >= steps:
        raise ConfigError(
            f"method.critic_warmup_steps = {method.critic_warmup_steps} leaves none of train.steps = {steps} to the policy. "
            "Lower the first, or raise train.steps, which counts both."
        )
    if method.rl.dynamic_sampling and method.rl.rollouts_per_prompt < 2:
        raise ConfigError(
            "method.rl.dynamic_sampling = true with method.rl.rollouts_per_prompt = 1: a single response never has both right "
            "and wrong ones beside it. Use at least 2 rollouts, or leave dynamic_sampling false."
        )


def _check_prime(method: PrimeMethod) -> None:
    _check_updates("prm_updates_per_step", method.prm_updates_per_step, method.rl)
    if method.least_accuracy > method.most_accuracy:
        raise ConfigError(
            f"method.least_accuracy = {method.least_accuracy:g} exceeds method.most_accuracy = {method.most_accuracy:g}, so no "
            "question would take part. Exchange them."
        )
    count = method.rl.rollouts_per_prompt
    if not any(method.least_accuracy <= right / count <= method.most_accuracy for right in range(count + 1)):
        raise ConfigError(
            f"no number of right responses among method.rl.rollouts_per_prompt = {count} is a share between "
            f"method.least_accuracy = {method.least_accuracy:g} and method.most_accuracy = {method.most_accuracy:g}, so no "
            "question would take part. Widen the two, or sample more."
        )
    default = PrimeMethod()
    for name in ("dense_baseline", "dense_norm"):
        if method.dense_coefficient == 0.0 and getattr(method, name) != getattr(default, name):
            raise ConfigError(
                f"method.{name} = '{getattr(method, name)}' has no effect with method.dense_coefficient = 0. Leave it out, or "
                "raise dense_coefficient."
            )
