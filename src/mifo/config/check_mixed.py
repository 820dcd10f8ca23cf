"""Settings that cannot work together in methods that learn from rollouts and demonstrations."""

from __future__ import annotations

from mifo.config.schema import (
    BreadMethod,
    ChordMethod,
    Config,
    GrpoMethod,
    HptMethod,
    ImitationConfig,
    LuffyMethod,
    MethodConfig,
    MultiStageMethod,
    PpoMethod,
    PrefixRftMethod,
    PrimeMethod,
    ReliftMethod,
    RlSftMethod,
    RlWithSftMethod,
    SasrMethod,
    SftRlMethod,
    SrftMethod,
    SuperRlMethod,
    UftMethod,
)
from mifo.errors import ConfigError


def check_mixed(config: Config) -> None:
    """Check the combinations of a method's own settings with each other and with the run's.

    Raises:
        ConfigError: names the fields, their values, the reason and the remedy.
    """
    method = config.method
    if isinstance(method, LuffyMethod | RlWithSftMethod | HptMethod | SuperRlMethod | ChordMethod):
        _check_joint(method)
    if isinstance(method, SftRlMethod | RlSftMethod | MultiStageMethod):
        _check_stages(method, config.train.steps)
    if isinstance(method, LuffyMethod | SrftMethod):
        _check_rewarded_demonstrations(config)
    if isinstance(method, RlWithSftMethod) and method.rl.rollouts_per_prompt < 3:
        raise ConfigError(
            f"method.rl.rollouts_per_prompt = {method.rl.rollouts_per_prompt} counts the demonstration, so one response is "
            "sampled and has no baseline. Use at least 3."
        )
    if isinstance(method, SrftMethod):
        _check_srft(method)
    if isinstance(method, SuperRlMethod) and method.gate == "reward" and config.reward.correct <= 0.0:
        raise ConfigError(
            f"method.gate = 'reward' asks for a positive reward, but reward.correct = {config.reward.correct:g}: no question "
            "would be learned by RL. Give correct answers a positive reward, or use method.gate = 'advantage'."
        )
    if isinstance(method, SuperRlMethod):
        _check_superrl(method)
    if isinstance(method, ChordMethod):
        _check_chord(method)


def imitation_batch(
    method: ReliftMethod
    | SftRlMethod
    | RlSftMethod
    | MultiStageMethod
    | RlWithSftMethod
    | HptMethod
    | SuperRlMethod
    | ChordMethod
    | UftMethod
    | SasrMethod
    | SrftMethod,
) -> int:
    """Most demonstrations that the method learns at once."""
    if isinstance(method, ReliftMethod):
        return method.buffer_size
    if isinstance(method, SftRlMethod | RlSftMethod | MultiStageMethod | SasrMethod):
        return method.sft_batch_size
    if isinstance(method, SrftMethod):
        return method.prompts_per_step
    return method.demonstrations_per_step if isinstance(method, ChordMethod) else method.rl.prompts_per_step


def updates_of_imitation(method: MethodConfig) -> tuple[str, int]:
    """The setting that says in how many updates a method learns one batch of demonstrations, and its value."""
    if isinstance(method, SrftMethod):
        return "method.updates_per_step", method.updates_per_step
    if isinstance(method, RlWithSftMethod | HptMethod | SuperRlMethod | ChordMethod | UftMethod):
        return "method.rl.updates_per_step", method.rl.updates_per_step
    assert not isinstance(method, GrpoMethod | LuffyMethod | PrefixRftMethod | BreadMethod | PpoMethod | PrimeMethod)
    return "method.sft.updates_per_batch", method.sft.updates_per_batch


def _check_joint(method: LuffyMethod | RlWithSftMethod | HptMethod | SuperRlMethod | ChordMethod) -> None:
    rl = method.rl
    if rl.dynamic_sampling:
        raise ConfigError(
            f"method.rl.dynamic_sampling = true with method.name = '{method.name}': groups that it drops are those that "
            "demonstrations are for. Leave it false."
        )
    if not isinstance(method, LuffyMethod):
        if method.sft.updates_per_batch > 1:
            raise ConfigError(
                f"method.sft.updates_per_batch = {method.sft.updates_per_batch} has no effect with method.name = "
                f"'{method.name}': demonstrations take part in RL's updates. Use method.rl.updates_per_step."
            )
    elif rl.advantage != "group" or rl.overlong_tokens is not None:
        raise ConfigError(
            f"method.rl.advantage = '{rl.advantage}' and method.rl.overlong_tokens = {rl.overlong_tokens} with method.name = "
            "'luffy': the baseline is the mean of rewards over rollouts and demonstration. Leave them out."
        )


def _check_stages(method: SftRlMethod | RlSftMethod | MultiStageMethod, steps: int) -> None:
    if isinstance(method, MultiStageMethod):
        cycle = method.sft_steps + method.rl_steps
        if steps % cycle:
            raise ConfigError(
                f"train.steps = {steps} is no multiple of a cycle of method.sft_steps = {method.sft_steps} and "
                f"method.rl_steps = {method.rl_steps}, so the last cycle would be cut short. Use a multiple of {cycle}."
            )
        return
    name, first = ("rl_steps", method.rl_steps) if isinstance(method, RlSftMethod) else ("sft_steps", method.sft_steps)
    if first >= steps:
        raise ConfigError(
            f"method.{name} = {first} leaves nothing of train.steps = {steps} for the second stage. Lower {name}, or raise "
            "train.steps, which counts both."
        )


def _check_rewarded_demonstrations(config: Config) -> None:
    if not config.data.verify_demonstrations:
        raise ConfigError(
            f"data.verify_demonstrations = false with method.name = '{config.method.name}', which gives every demonstration "
            "the reward of a correct answer. Leave it true."
        )


def _check_srft(method: SrftMethod) -> None:
    if method.prompts_per_step % method.updates_per_step:
        raise ConfigError(
            f"method.prompts_per_step = {method.prompts_per_step} does not divide into method.updates_per_step = "
            f"{method.updates_per_step} equal updates. Choose a divisor."
        )
    default = ImitationConfig()
    for name in ("updates_per_batch", "normalizer", "constant_tokens", "entropy_coefficient"):
        if getattr(method.sft, name) != getattr(default, name):
            raise ConfigError(
                f"method.sft.{name} = {getattr(method.sft, name)} has no effect with method.name = 'srft', which weighs and sums "
                "its streams by settings of its own. Leave it out."
            )
    if method.sft_scale == 0.0 and method.sft != default:
        raise ConfigError(
            "method.sft has no effect with method.sft_scale = 0. Leave the table out, or raise sft_scale."
        )
    if method.sft_scale == 0.0 and method.sft_entropy_sign != SrftMethod.sft_entropy_sign:
        raise ConfigError(
            f"method.sft_entropy_sign = '{method.sft_entropy_sign}' has no effect with method.sft_scale = 0. Leave it out, or "
            "raise sft_scale."
        )


def _check_superrl(method: SuperRlMethod) -> None:
    unused = ("denominator",) if method.gate == "log_sigma" else ("sigma_rate", "sigma_bound")
    for name in unused:
        if getattr(method, name) != getattr(SuperRlMethod, name):
            raise ConfigError(
                f"method.{name} = {getattr(method, name)} has no effect with method.gate = '{method.gate}'. Leave it out."
            )


def _check_chord(method: ChordMethod) -> None:
    if method.demonstrations_per_step % method.rl.updates_per_step:
        raise ConfigError(
            f"method.demonstrations_per_step = {method.demonstrations_per_step} does not divide into "
            f"method.rl.updates_per_step = {method.rl.updates_per_step} equal updates. Choose a multiple."
        )
    if method.mu_valley > method.mu_peak:
        raise ConfigError(
            f"method.mu_valley = {method.mu_valley:g} exceeds method.mu_peak = {method.mu_peak:g}, but mu falls from its peak to "
            "its valley. Exchange them."
        )
    if method.mu_decay_steps == 0 and method.mu_valley != method.mu_peak:
        raise ConfigError(
            f"method.mu_peak = {method.mu_peak:g} and method.mu_valley = {method.mu_valley:g} differ, but "
            "method.mu_decay_steps = 0 leaves no step between them. Give "
            "both the same value for a constant mu, or raise mu_decay_steps."
        )
