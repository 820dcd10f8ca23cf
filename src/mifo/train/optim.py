"""AdamW with its schedule: what one named optimizer ("rl" or "sft") keeps between phases."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mifo.config.schema import OptimizerConfig


def learning_rate(config: OptimizerConfig, update: int) -> float:
    """Rate of the `update`-th update, counted from 0: linear warm-up, then constant, linear or cosine to the minimum."""
    if update < config.warmup_updates:
        return config.learning_rate * (update + 1) / config.warmup_updates
    if config.schedule == "constant" or config.decay_updates is None:
        return config.learning_rate
    span = config.decay_updates - config.warmup_updates
    progress = min(1.0, (update - config.warmup_updates) / span)
    fall = progress if config.schedule == "linear" else 0.5 * (1.0 - math.cos(math.pi * progress))
    return config.learning_rate * (1.0 - (1.0 - config.minimum_ratio) * fall)


class ScheduledAdamW:
    """AdamW over all trainable parameters, its update counter and its rate.

    Moments are made at the first step, so an optimizer that never runs costs nothing.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], config: OptimizerConfig) -> None:
        self.config = config
        self.parameters = list(parameters)
        self.updates = 0
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def reset(self) -> None:
        """No moments, and the schedule from its start."""
        self.updates = 0
        self.optimizer.state.clear()

    def restart(self, config: OptimizerConfig) -> None:
        """No moments, and other settings from their start."""
        self.config = config
        self.reset()
        for group in self.optimizer.param_groups:
            group |= {"betas": (config.beta1, config.beta2), "eps": config.epsilon, "weight_decay": config.weight_decay}

    @torch.no_grad()
    def forget(self, parameter: nn.Parameter, neurons: Tensor, dimension: int) -> None:
        """Momentum of some rows or columns of a parameter back to zero; their second moment stays (see `train.rejuvenate`).

        Args:
            parameter: one of this optimizer's.
            neurons: bool, one for each row or column.
            dimension: which index of the parameter counts them.
        """
        momentum = self.optimizer.state.get(parameter, {}).get("exp_avg")
        if momentum is not None:
            momentum.index_fill_(dimension, neurons.nonzero()[:, 0], 0.0)

    def prepare(self) -> float:
        """Set and return the rate of the coming update."""
        rate = learning_rate(self.config, self.updates)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        return rate

    def state_tensors(self) -> dict[str, Tensor]:
        """Moments and step counts under `{index}.{name}`; empty before the first step."""
        state = self.optimizer.state_dict()["state"]
        return {f"{index}.{name}": value for index, entry in state.items() for name, value in entry.items()}

    def state_dict(self) -> dict[str, Any]:
        """Plain data; the tensors are `state_tensors`."""
        return {"updates": self.updates}

    def load(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Restore counter and moments."""
        self.updates = int(state["updates"])
        entries: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            index, name = key.split(".", 1)
            entries.setdefault(int(index), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": entries, "param_groups": groups})
