"""Settings of an imitation loss that cannot work together, or not with its method."""

from __future__ import annotations

from mifo.config.check_mixed import updates_of_imitation
from mifo.config.check_phases import check_adapters
from mifo.config.schema import Config, ImitationConfig, MifoMethod, SftMethod
from mifo.errors import ConfigError

LOSS_OF = {"gem_beta": "gem", "gem_weight": "gem", "psft_clip": "psft", "asft_kl": "asft", "eaft_alpha": "eaft"}


def check_imitation(sft: ImitationConfig, batch: int, config: Config) -> None:
    """Check a loss and how it is applied.

    Args:
        sft: the imitation loss of the configuration's method.
        batch: most demonstrations that the method learns at once.
        config: all of it.

    Raises:
        ConfigError: names the fields, their values, the reason and the remedy.
    """
    check_adapters(sft, config)
    default = ImitationConfig()
    for name, loss in LOSS_OF.items():
        if getattr(sft, name) != getattr(default, name) and sft.loss != loss:
            raise ConfigError(
                f"method.sft.{name} = {getattr(sft, name)} has no effect with method.sft.loss = '{sft.loss}'. Leave it "
                f"out, or set the loss to '{loss}'."
            )
    setting, updates = updates_of_imitation(config.method)
    if sft.loss == "psft" and updates == 1:
        raise ConfigError(
            f"method.sft.loss = 'psft' with {setting} = 1: old and current policy are then the same, and the loss is "
            "cross-entropy. Use several updates (the paper makes 8 from a batch of 64)."
        )
    if sft.token_fraction != 1.0 and isinstance(config.method, MifoMethod | SftMethod):
        raise ConfigError(
            f"method.sft.token_fraction = {sft.token_fraction:g} has no effect with method.name = '{config.method.name}', whose "
            "own method.token_fraction says it. Set that one."
        )
    if sft.updates_per_batch > batch:
        raise ConfigError(
            f"method.sft.updates_per_batch = {sft.updates_per_batch} exceeds the {batch} demonstrations of a batch. Lower it."
        )
    if sft.constant_tokens is not None and sft.normalizer != "constant":
        raise ConfigError(
            f"method.sft.constant_tokens = {sft.constant_tokens} has no effect with method.sft.normalizer = "
            f"'{sft.normalizer}'. Set the normalizer to 'constant' or leave constant_tokens out."
        )
