"""The last weights at which loss and gradient were as usual, for `guard.on_spike = "rollback"`.

A spike that is measured at θ_t was made by the step that led there. Each step therefore leaves behind what it started from:
the parameters, at which its own loss and norm were judged normal, and the moments of the optimizer that takes it. Going back
undoes that one step and skips the update that showed the spike; data, buffer, sampler position and ledger go on, so the same
samples do not come again. The other optimizer is not touched: no step of its own lies in between, since a change of phase
forgets the copy. The copy is in main memory, 12 bytes an element under AdamW, and is part of checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mifo.train.optim import ScheduledAdamW


class LastGood:
    """A copy of the parameters and of one optimizer's state."""

    def __init__(self) -> None:
        self.updates = 0
        self._parameters: list[Tensor] = []
        self._moments: dict[str, Tensor] = {}

    @property
    def held(self) -> bool:
        """Whether there is a copy to go back to."""
        return bool(self._parameters)

    def forget(self) -> None:
        """Drop the copy and its memory."""
        self._parameters, self._moments, self.updates = [], {}, 0

    @torch.no_grad()
    def keep(self, parameters: Sequence[nn.Parameter], optimizer: ScheduledAdamW) -> None:
        """Copy everything that a step changes."""
        moments = optimizer.state_tensors()
        if len(self._parameters) == len(parameters) and self._moments.keys() == moments.keys():
            for kept, now in zip(self._parameters, parameters, strict=True):
                kept.copy_(now)
            for name, now in moments.items():
                self._moments[name].copy_(now)
        else:
            self._parameters = [p.detach().to("cpu", copy=True) for p in parameters]
            self._moments = {name: value.to("cpu", copy=True) for name, value in moments.items()}
        self.updates = optimizer.updates

    @torch.no_grad()
    def restore(self, parameters: Sequence[nn.Parameter], optimizer: ScheduledAdamW) -> None:
        """Put everything back, and forget the copy: one step is undone, never two."""
        for kept, now in zip(self._parameters, parameters, strict=True):
            now.copy_(kept)
        optimizer.load({"updates": self.updates}, self._moments)
        self.forget()

    def state_tensors(self) -> dict[str, Tensor]:
        """The copy under `parameter.{index}` and `moment.{name}`; empty where there is none."""
        parameters = {f"parameter.{index}": tensor for index, tensor in enumerate(self._parameters)}
        return parameters | {f"moment.{name}": tensor for name, tensor in self._moments.items()}

    def load(self, updates: int, tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_tensors` gave."""
        self.updates = updates
        count = sum(name.startswith("parameter.") for name in tensors)
        self._parameters = [tensors[f"parameter.{index}"] for index in range(count)]
        self._moments = {
            name.removeprefix("moment."): tensor for name, tensor in tensors.items() if name.startswith("moment.")
        }
