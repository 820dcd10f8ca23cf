"""The ranks of a run and the few sums they exchange.

The mathematics of `core` is written over (local tensors, a function that sums over ranks); this is that function. Gradients of
replicated parameters are summed, never averaged: the denominators already count all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class World:
    """This rank among `size` ranks that hold the same parameters and different sequences."""

    rank: int = 0
    size: int = 1

    def all_sum(self, tensor: Tensor) -> Tensor:
        """The sum of `tensor` over all ranks."""
        if self.size == 1:
            return tensor
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """g ← Σ_ranks g, in place; a rank that saw no sequence takes part with zeros."""
        if self.size == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)


def current_world() -> World:
    """The world of an initialised process group, or one rank."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World()
