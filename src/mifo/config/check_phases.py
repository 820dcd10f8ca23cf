"""Settings of SFT phases that cannot work together: adapters, and the control of freezing."""

from __future__ import annotations

from mifo.config.schema import (
    Config,
    FreezeControlConfig,
    ImitationConfig,
    MifoMethod,
    MultiStageMethod,
    ReliftMethod,
    RlSftMethod,
    SftMethod,
    SftRlMethod,
)
from mifo.errors import ConfigError

OWN_SFT_PHASES = (SftMethod, SftRlMethod, RlSftMethod, MultiStageMethod, ReliftMethod, MifoMethod)


def check_adapters(sft: ImitationConfig, config: Config) -> None:
    """Low-rank adapters need SFT phases of their own, and replace what SFT does to the weights.

    Raises:
        ConfigError: names the fields, their values, the reason and the remedy.
    """
    method = config.method
    if sft.lora_rank is None:
        if sft.lora_alpha != ImitationConfig.lora_alpha:
            raise ConfigError(
                f"method.sft.lora_alpha = {sft.lora_alpha:g} has no effect without method.sft.lora_rank. Set it, or leave "
                "lora_alpha out."
            )
        return
    if not isinstance(method, OWN_SFT_PHASES):
        raise ConfigError(
            f"method.sft.lora_rank = {sft.lora_rank} with method.name = '{method.name}', whose updates learn demonstrations and "
            "rollouts together: adapters are trained in SFT phases of their own. Leave lora_rank out, or use "
            f"{', '.join(member.name for member in OWN_SFT_PHASES)}."
        )
    if config.train.gradient_drop > 0.0:
        raise ConfigError(
            f"train.gradient_drop = {config.train.gradient_drop:g} with method.sft.lora_rank: it clears gradients of weights, "
            "which have none while adapters are trained. Leave one of them out."
        )
    if isinstance(method, MifoMethod) and method.freeze == "grad_zero":
        raise ConfigError(
            "method.freeze = 'grad_zero' with method.sft.lora_rank: the weights have no gradients while adapters are trained, "
            "and the mask acts on the merged change. Leave freeze at 'hard'."
        )
    if isinstance(method, MifoMethod) and method.optimizers == "shared":
        raise ConfigError(
            "method.optimizers = 'shared' with method.sft.lora_rank: RL's moments are those of the weights, not of the "
            "adapters. Use 'separate'."
        )


def check_control(method: MifoMethod, config: Config) -> None:
    """The control of freezing needs what it goes by, and limits around where it starts.

    Raises:
        ConfigError: names the fields, their values, the reason and the remedy.
    """
    control = method.control
    if control.target_drop is None:
        changed = [name for name, value in vars(FreezeControlConfig()).items() if getattr(control, name) != value]
        if changed:
            raise ConfigError(
                f"method.control.{changed[0]} = {getattr(control, changed[0]):g} has no effect without "
                "method.control.target_drop. Set the drop to steer to, such as 0.02, or leave the table out."
            )
        return
    if not config.evaluation.around_sft or config.data.evaluation == "none":
        raise ConfigError(
            f"method.control.target_drop = {control.target_drop:g} goes by the forgetting meter, but evaluation.around_sft = "
            f"{str(config.evaluation.around_sft).lower()} and data.evaluation = '{config.data.evaluation}'. Measure around "
            "SFT on held-out problems, or leave target_drop out."
        )
    if not control.freeze_min <= method.freeze_top <= control.freeze_max:
        raise ConfigError(
            f"method.freeze_top = {method.freeze_top:g}, where control starts, is not between method.control.freeze_min = "
            f"{control.freeze_min:g} and method.control.freeze_max = {control.freeze_max:g}. Move one of them."
        )
    if control.freeze_min == control.freeze_max and control.token_gain == 0.0:
        raise ConfigError(
            f"method.control.freeze_min = method.control.freeze_max = {control.freeze_min:g} leaves control nothing to move. "
            "Lower the first, raise the second, or leave target_drop out."
        )
    _check_token_control(method, control)


def _check_token_control(method: MifoMethod, control: FreezeControlConfig) -> None:
    if control.token_gain == 0.0:
        for name in ("token_min", "token_max"):
            value = getattr(control, name)
            if value != getattr(FreezeControlConfig, name):
                raise ConfigError(
                    f"method.control.{name} = {value:g} has no effect with method.control.token_gain = 0. Raise the gain, or "
                    f"leave {name} out."
                )
    elif not control.token_min <= method.token_fraction <= control.token_max:
        raise ConfigError(
            f"method.token_fraction = {method.token_fraction:g}, where control starts, is not between method.control.token_min = "
            f"{control.token_min:g} and method.control.token_max = {control.token_max:g}. Move one of them."
        )
