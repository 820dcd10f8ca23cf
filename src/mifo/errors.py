"""What a user can get wrong.

Every message names the field, the value, the reason and the remedy. Broken invariants of the code itself are
`assert`, never one of these.
"""

from __future__ import annotations

from collections.abc import Sequence


class MifoError(Exception):
    """Base of every error that a user can cause and mend."""


class ConfigError(MifoError):
    """A recipe, a TOML file or a flag is wrong; raised before any model is loaded."""


class DataError(MifoError):
    """A data file is missing, unreadable, or holds nothing that can be trained on."""


class ModelError(MifoError):
    """A model or tokenizer cannot be loaded, or cannot do what the run needs of it."""


class DeviceError(MifoError):
    """The device that was asked for is not there or lacks what the run needs."""


class CheckpointError(MifoError):
    """A checkpoint is missing, incomplete, or belongs to another run."""


class NumericsError(MifoError):
    """A loss, gradient, log-prob or weight is not finite.

    `rollouts` holds (prompt, rollout) of the request whose log-probs are not, where a rollout engine found out.
    """

    def __init__(self, message: str, rollouts: Sequence[tuple[int, int]] = ()) -> None:
        super().__init__(message)
        self.rollouts = tuple(rollouts)


class RewardError(MifoError):
    """Grading failed for a reason that is not the model's answer (no worker starts, too many time-outs)."""
