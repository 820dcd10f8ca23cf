"""Passes over large tensors, block by block.

On the CPU several operations on one block find it in a core's cache again, so that the tensors cross the memory bus once a
pass and not once an operation; elsewhere a block only bounds the memory of what is computed on the way. Counts on the CPU are
numpy's, which are several times faster than torch's.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

CACHE_BLOCK = 1 << 16
DEVICE_BLOCK = 1 << 22


def _block_size(device: torch.device) -> int:
    """Elements of a block on a device."""
    return CACHE_BLOCK if device.type == "cpu" else DEVICE_BLOCK


def blocks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Flat views of the same elements of every tensor; all are contiguous and hold equally many elements on one device."""
    size = _block_size(tensors[0].device)
    return zip(*(tensor.detach().view(-1).split(size) for tensor in tensors), strict=True)


def count_from(values: Tensor, least: float) -> int:
    """Elements of an fp32 block that are at least `least`."""
    if values.device.type == "cpu":
        return int(np.count_nonzero(values.numpy() >= np.float32(least)))
    return int(torch.count_nonzero(values >= least))
