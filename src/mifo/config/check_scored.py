"""Settings that cannot work together in RL with a second model: PPO's critic, PRIME's reward model."""

from __future__ import annotations

from mifo.config.schema import (
    Config,
    MethodConfig,
    MifoMethod,
    MultiStageMethod,
    PolicyGradientConfig,
    PpoMethod,
    PrimeMethod,
    ReliftMethod,
    RlSftMethod,
    SftRlMethod,
)
from mifo.config.scored import OWNERS, CriticSettings, RewardModelSettings
from mifo.errors import ConfigError

MODELS = {"ppo": "critic", "prime": "process reward model"}
AROUND_RL = (MifoMethod, ReliftMethod, SftRlMethod, RlSftMethod, MultiStageMethod)


def second_model(method: MethodConfig) -> CriticSettings | RewardModelSettings | None:
    """The settings of what scores the tokens of a method's rollouts; None where nothing does."""
    if isinstance(method, PpoMethod | PrimeMethod):
        return method
    return method.scorer if isinstance(method, AROUND_RL) else None


def _kind(settings: CriticSettings | RewardModelSettings | None) -> str | None:
    if settings is None:
        return None
    return "ppo" if isinstance(settings, CriticSettings) else "prime"


def check_second_models(config: Config) -> None:
    """A run has one second model at most, and its optimizer's table is set only where there is one.

    Raises:
        ConfigError: names the fields, their values, the reason and the remedy.
    """
    kinds = {_kind(second_model(stage.method)) for stage in config.by_stage} - {None}
    for table, owner in OWNERS.items():
        if owner not in kinds and getattr(config, table) != getattr(Config(), table):
            raise ConfigError(
                f"[{table}] is set, but method.name = '{config.method_name}' has no {MODELS[owner]}. Leave the table out, use "
                f"method.name = '{owner}', or give a method whose RL has steps of its own "
                f'({", ".join(member.name for member in AROUND_RL)}) a [method.scorer] table with name = "{owner}".'
            )
    if len(kinds) > 1:
        raise ConfigError(
            f"stages: {config.method_name} need a critic (ppo) and a process reward model (prime), but a run has one second "
            "model. Put the later stage into a run of its own, from the export of the first."
        )


def check_scored(config: Config) -> None:
    """Check the combinations of settings of RL with a second model.

    Raises:
        ConfigError: names the fields, their values, the reason and the remedy.
    """
    method = config.method
    settings = second_model(method)
    if settings is None:
        return
    assert isinstance(method, (PpoMethod, PrimeMethod, *AROUND_RL))
    own = isinstance(method, PpoMethod | PrimeMethod)
    place, chosen = ("method", "method.name") if own else ("method.scorer", "method.scorer.name")
    _check_own_advantages(method.rl, f"{chosen} = '{_kind(settings)}'")
    if isinstance(settings, CriticSettings):
        _check_ppo(settings, method.rl, place, _rl_steps(method, config.train.steps))
    else:
        _check_prime(settings, method.rl, place)


def _check_own_advantages(rl: PolicyGradientConfig, chosen: str) -> None:
    if rl.advantage != PolicyGradientConfig.advantage or rl.advantage_std:
        raise ConfigError(
            f"method.rl.advantage = '{rl.advantage}' and method.rl.advantage_std = {str(rl.advantage_std).lower()} with "
            f"{chosen}, whose advantages are its second model's. Leave them out."
        )


def _check_updates(field: str, updates: int, rl: PolicyGradientConfig) -> None:
    rollouts = rl.prompts_per_step * rl.rollouts_per_prompt
    if updates > rollouts:
        raise ConfigError(f"{field} = {updates} exceeds the {rollouts} rollouts of a step. Lower it.")


def _rl_steps(method: MethodConfig, steps: int) -> tuple[str, int]:
    """How many RL steps in a row a critic lives for, and the setting that says it."""
    if isinstance(method, RlSftMethod | MultiStageMethod):
        return f"method.rl_steps = {method.rl_steps}", method.rl_steps
    if isinstance(method, SftRlMethod):
        rest = steps - method.sft_steps
        return f"the {rest} RL steps of train.steps = {steps}", rest
    return f"train.steps = {steps}", steps


def _check_ppo(critic: CriticSettings, rl: PolicyGradientConfig, place: str, rl_steps: tuple[str, int]) -> None:
    said, steps = rl_steps
    _check_updates(f"{place}.critic_updates_per_step", critic.critic_updates_per_step, rl)
    if critic.critic_warmup_steps >= steps:
        raise ConfigError(
            f"{place}.critic_warmup_steps = {critic.critic_warmup_steps} leaves none of {said} to the policy, which would never "
            "learn by RL. Lower the first, or raise the steps, which count both."
        )
    if rl.dynamic_sampling and rl.rollouts_per_prompt < 2:
        raise ConfigError(
            "method.rl.dynamic_sampling = true with method.rl.rollouts_per_prompt = 1: a single response never has both right "
            "and wrong ones beside it. Use at least 2 rollouts, or leave dynamic_sampling false."
        )


def _check_prime(prime: RewardModelSettings, rl: PolicyGradientConfig, place: str) -> None:
    _check_updates(f"{place}.prm_updates_per_step", prime.prm_updates_per_step, rl)
    if prime.least_accuracy > prime.most_accuracy:
        raise ConfigError(
            f"{place}.least_accuracy = {prime.least_accuracy:g} exceeds {place}.most_accuracy = {prime.most_accuracy:g}, so no "
            "question would take part. Exchange them."
        )
    count = rl.rollouts_per_prompt
    if not any(prime.least_accuracy <= right / count <= prime.most_accuracy for right in range(count + 1)):
        raise ConfigError(
            f"no number of right responses among method.rl.rollouts_per_prompt = {count} is a share between "
            f"{place}.least_accuracy = {prime.least_accuracy:g} and {place}.most_accuracy = {prime.most_accuracy:g}, so no "
            "question would take part. Widen the two, or sample more."
        )
    default = RewardModelSettings()
    for name in ("dense_baseline", "dense_norm"):
        if prime.dense_coefficient == 0.0 and getattr(prime, name) != getattr(default, name):
            raise ConfigError(
                f"{place}.{name} = '{getattr(prime, name)}' has no effect with {place}.dense_coefficient = 0. Leave it out, or "
                "raise dense_coefficient."
            )
