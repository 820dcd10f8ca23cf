"""Rejuvenations that would do nothing, or could never come."""

from __future__ import annotations

from mifo.config.decode import numbered
from mifo.config.rejuvenation import IntervalRejuvenationConfig, RejuvenationConfig
from mifo.config.schema import REJUVENATE, Config, MifoMethod, MultiStageMethod, ReliftMethod
from mifo.errors import ConfigError

RETURNS_TO_RL = (MifoMethod, ReliftMethod, MultiStageMethod)
"""Methods whose SFT phases are followed by RL again."""


def check_rejuvenation(config: Config) -> None:
    """Check stages that rejuvenate, and rejuvenation between intervals.

    Raises:
        ConfigError: names the fields, their values, the reason and the remedy.
    """
    trained = False
    for index, stage in enumerate(config.stages):
        if stage.rejuvenate is not None:
            where = f"{numbered('stages', index)}.{REJUVENATE}"
            _check_place(config, index, where, trained=trained)
            _check_switches(stage.rejuvenate, where)
        trained = trained or stage.rejuvenate is None
    _check_intervals(config)


def _check_place(config: Config, index: int, where: str, *, trained: bool) -> None:
    settings = config.stages[index].rejuvenate
    assert settings is not None
    if index + 1 == len(config.stages):
        raise ConfigError(
            f"{where} is the last of {len(config.stages)} stages, and a rejuvenated model is there to be trained. Add a stage "
            "behind it, or leave it out and use `mifo rejuvenate` on the export."
        )
    if config.stages[index + 1].rejuvenate is not None:
        raise ConfigError(
            f"{where} is followed by another rejuvenation, with nothing trained in between. Leave one of them out."
        )
    if not trained and settings.base is None:
        raise ConfigError(
            f"{where} comes before anything is trained, so the model would be fused with itself. Put it behind a stage that "
            f"trains, or name the model before SFT as {where}.base."
        )


def _check_switches(settings: RejuvenationConfig, where: str) -> None:
    if settings.alpha == 1.0 and settings.rho == 0.0:
        raise ConfigError(
            f"{where}.alpha = 1 with {where}.rho = 0 leaves every weight as it is. Lower alpha or raise rho, or leave the "
            "rejuvenation out."
        )
    if settings.alpha == 0.0:
        raise ConfigError(
            f"{where}.alpha = 0 gives back the base, and all that was trained is lost. The paper's is 0.5."
        )
    if settings.rho == 0.0:
        for name in ("signed", "per_module_quota"):
            if getattr(settings, name):
                raise ConfigError(
                    f"{where}.{name} = true has no effect with {where}.rho = 0, which resets no neuron. Leave it out."
                )


def _check_intervals(config: Config) -> None:
    settings = config.rejuvenation
    every = settings.every_intervals
    if every is None:
        default = IntervalRejuvenationConfig()
        changed = [name for name, value in vars(default).items() if getattr(settings, name) != value]
        if changed:
            raise ConfigError(
                f"rejuvenation.{changed[0]} = {getattr(settings, changed[0])} has no effect without "
                f"rejuvenation.every_intervals. Set it, or, for a single rejuvenation, write a [[stages]] entry with "
                f"[stages.{REJUVENATE}]."
            )
        return
    methods = [stage.method for stage in config.by_stage]
    if not any(isinstance(method, RETURNS_TO_RL) for method in methods):
        named = ", ".join(f"'{method.name}'" for method in methods)
        raise ConfigError(
            f"rejuvenation.every_intervals = {every} with method.name = {named}, which never returns from an SFT phase to RL. "
            f"Use {', '.join(member.name for member in RETURNS_TO_RL)}, or a [[stages]] entry with [stages.{REJUVENATE}]."
        )
    _check_switches(settings, "rejuvenation")
    for stage in config.by_stage:
        method = stage.method
        if isinstance(method, MultiStageMethod):
            cycles = stage.train.steps // (method.sft_steps + method.rl_steps)
            if every > cycles:
                raise ConfigError(
                    f"rejuvenation.every_intervals = {every} never comes with {cycles} cycles of method.name = 'multi_stage'. "
                    "Lower it, or raise train.steps."
                )
