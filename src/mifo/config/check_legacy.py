"""Legacy settings stand only beside the method whose published code has them."""

from __future__ import annotations

from mifo.config.legacy import LegacyConfig, in_force
from mifo.config.schema import (
    ChordMethod,
    Config,
    HptMethod,
    LuffyMethod,
    ReliftMethod,
    RlWithSftMethod,
    SftMethod,
)
from mifo.errors import ConfigError

SUMS = {"reducer", "gpus", "micro_batch_tokens"}
OF_CODE = {
    "luffy": SUMS | {"require_thought_end"},
    "rl_with_sft": SUMS | {"require_thought_end"},
    "relift": SUMS | {"require_thought_end", "sft_over_gpus"},
    "hpt": SUMS | {"skip_above_norm"},
    "chord": SUMS,
    "psft": {"append_end"},
    "prefix_rft": {"prefix_ranking", "gpus", "micro_batch_tokens"},
}
REDUCER = {"chord": "by_sequences"}  # of the others: per_gpu


def check_legacy(config: Config) -> None:
    """Refuse legacy settings outside recipes of the code that has them.

    Raises:
        ConfigError: names the field, the reason and the remedy.
    """
    legacy, settings = config.legacy, in_force(config.legacy)
    if settings is None:
        return
    listed = ", ".join(f"legacy.{name}" for name in settings if name != "name")
    if legacy.name == "none":
        raise ConfigError(
            f"{listed} without legacy.name: a defect of a published code is not switched on by itself. Name the code in the "
            "recipe, or leave it out."
        )
    if _trains_by(config) != legacy.name:
        raise ConfigError(
            f"legacy.name = '{legacy.name}' with {_described(config)}: what that code does holds for its own method alone. Leave "
            'the [legacy] table out, or write name = "none" into it.'
        )
    strange = sorted(settings.keys() - OF_CODE[legacy.name] - {"name"})
    if strange:
        raise ConfigError(
            f"legacy.{strange[0]} = {settings[strange[0]]} is nothing that the code of '{legacy.name}' does. Leave it out."
        )
    if len(settings) == 1:
        raise ConfigError(
            f"legacy.name = '{legacy.name}' alone changes nothing. Set what the code does, or leave it out."
        )
    _check_sums(config, legacy)


def _trains_by(config: Config) -> str:
    method = config.method
    return method.sft.loss if isinstance(method, SftMethod) else method.name


def _described(config: Config) -> str:
    loss = f" and method.sft.loss = '{config.method.sft.loss}'" if isinstance(config.method, SftMethod) else ""
    return f"method.name = '{config.method.name}'{loss}"


def _check_sums(config: Config, legacy: LegacyConfig) -> None:
    simulated = (legacy.gpus, legacy.micro_batch_tokens)
    if legacy.prefix_ranking == "within_micro_batches":
        if None in simulated:
            raise ConfigError(
                "legacy.prefix_ranking = 'within_micro_batches' needs legacy.gpus and legacy.micro_batch_tokens: what is kept "
                "depends on them."
            )
        return
    if legacy.reducer == "update":
        if legacy.micro_batch_tokens is not None or (legacy.gpus is not None and not legacy.sft_over_gpus):
            raise ConfigError(
                f"legacy.gpus = {simulated[0]} and legacy.micro_batch_tokens = {simulated[1]} have no effect with "
                "legacy.reducer = 'update'. Leave them out, or set the reducer."
            )
        if legacy.sft_over_gpus and legacy.gpus is None:
            raise ConfigError("legacy.sft_over_gpus = true needs legacy.gpus: by how many to divide.")
        return
    expected = REDUCER.get(legacy.name, "per_gpu")
    if legacy.reducer != expected:
        raise ConfigError(
            f"legacy.reducer = '{legacy.reducer}' is not what the code of '{legacy.name}' does. Use '{expected}'."
        )
    if None in simulated:
        raise ConfigError(
            f"legacy.reducer = '{legacy.reducer}' needs legacy.gpus and legacy.micro_batch_tokens: the published sums "
            "depend on them."
        )
    method = config.method
    assert isinstance(method, LuffyMethod | RlWithSftMethod | ReliftMethod | HptMethod | ChordMethod)
    if legacy.reducer == "per_gpu" and method.rl.normalizer != "constant":
        raise ConfigError(
            f"method.rl.normalizer = '{method.rl.normalizer}' with legacy.reducer = 'per_gpu', which divides by a constant. Set "
            "it to 'constant'."
        )
    if isinstance(method, HptMethod) and method.denominator != "stream":
        raise ConfigError(
            "method.denominator = 'batch' with legacy.name = 'hpt': in that code what takes no part is not in the batch. Set it "
            "to 'stream'."
        )
