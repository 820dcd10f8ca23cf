"""What the probes that train have in common: configurations made from a recipe's, and where their runs live."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mifo.config.decode import encode
from mifo.config.schema import (
    Config,
    GrpoMethod,
    ImitationConfig,
    LuffyMethod,
    MethodConfig,
    PolicyGradientConfig,
    ReliftMethod,
    SftMethod,
    SrftMethod,
)
from mifo.errors import ConfigError
from mifo.lab.claims import Claim
from mifo.lab.trials import TrialFailure
from mifo.train.stop import Stop

Loss = Literal["cross_entropy", "dft", "gem", "psft", "asft", "eaft", "chord_phi"]


def _silent(_: str) -> None:
    """Nobody is told."""


@dataclass(frozen=True, kw_only=True)
class Workplace:
    """Where and how runs are made; none of it changes what is measured.

    Attributes:
        folder: of the trials (see `lab.trials`); the same folder goes on where it was left.
        jobs: runs at a time.
        threads: CPU threads of each.
        stop: asked to end early.
        say: hears of every run that ends.
    """

    folder: Path
    jobs: int = 1
    threads: int = 1
    stop: Stop = field(default_factory=Stop)
    say: Callable[[str], None] = _silent


def base_config(config: Config, *, start: str | None = None) -> Config:
    """A recipe's configuration without its bounds beside steps, from another model where one is named.

    Raises:
        ConfigError: the recipe is a list of stages, or has no held-out problems.
    """
    if config.stages:
        raise ConfigError(
            f"the recipe is a list of {len(config.stages)} stages; the probe makes its own. Name a recipe of one method."
        )
    if config.data.evaluation == "none":
        raise ConfigError(
            "data.evaluation = 'none': the probe measures on held-out problems. Name a recipe that has some."
        )
    model = config.model
    if start is not None:
        model = replace(model, path=start, revision=None, rope_theta=None, context=None)
    train = replace(config.train, minutes=None, max_flops=None, max_tokens=None)
    evaluation = replace(config.evaluation, every_steps=None, every_flops=None, around_sft=False, meter_problems=None)
    return replace(config, model=model, train=train, evaluation=evaluation)


def sft_config(
    config: Config,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    loss: Loss = "cross_entropy",
    token_fraction: float = 1.0,
) -> Config:
    """SFT alone on a recipe's model and data, with its SFT optimizer and settings of imitation but for the loss."""
    own: Any = config.method
    sft = own.sft if "sft" in encode(config.method) else ImitationConfig()
    updates = 2 if loss == "psft" else 1  # of one update psft is cross-entropy
    sft = replace(sft, loss=loss, token_fraction=1.0, updates_per_batch=updates, lora_rank=None)
    method = SftMethod(sft=sft, batch_size=batch_size, token_fraction=token_fraction)
    return replace(config, method=method, train=replace(config.train, steps=steps, seed=seed))


def rl_config(config: Config, *, steps: int, seed: int) -> Config:
    """RL alone on a recipe's model and data, with its policy gradient and RL optimizer."""
    own: Any = config.method
    rl = own.rl if "rl" in encode(config.method) else PolicyGradientConfig()
    return replace(config, method=GrpoMethod(rl=rl), train=replace(config.train, steps=steps, seed=seed))


def mixed_config(config: Config, name: str, *, steps: int, batch_size: int, seed: int) -> Config:
    """LUFFY, SRFT or ReLIFT on a recipe's model and data, with its policy gradient, imitation loss and optimizers."""
    own: Any = config.method
    rl = own.rl if "rl" in encode(config.method) else PolicyGradientConfig()
    sft = replace(own.sft, lora_rank=None) if "sft" in encode(config.method) else ImitationConfig()
    method: MethodConfig
    if name == "luffy":
        method = LuffyMethod(rl=rl)
    elif name == "srft":
        method = SrftMethod(
            prompts_per_step=rl.prompts_per_step,
            rollouts_per_prompt=rl.rollouts_per_prompt,
            updates_per_step=rl.updates_per_step,
            sft=sft,
        )
    else:
        method = ReliftMethod(rl=rl, sft=sft, buffer_size=batch_size)
    return replace(config, method=method, train=replace(config.train, steps=steps, seed=seed))


def check_counts(**counts: int) -> None:
    """Counts that a user gave are at least one.

    Raises:
        ConfigError: names the flag.
    """
    for name, value in counts.items():
        if value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: at least 1 is needed. Give a larger number.")


def with_verdicts(plain: dict[str, Any], claims: Sequence[Claim], failures: Sequence[TrialFailure]) -> dict[str, Any]:
    """What a probe found as plain data, with the verdict beside each of its "claims" and the logs of "failures" as text."""
    plain["claims"] = [asdict(claim) | {"verdict": claim.verdict} for claim in claims]
    plain["failures"] = [asdict(failure) | {"log": str(failure.log)} for failure in failures]
    return plain
