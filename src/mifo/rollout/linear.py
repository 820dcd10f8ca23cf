"""A linear layer of the decode loop: y = x Wᵀ + b, with the weights in the layout that is fastest on the device.

On CPU oneDNN can reorder a weight once into the blocked layout of its matrix kernels, which makes the small matrix
products of a decode step about 1.5 times as fast as `F.linear`. The operators that do so are private to PyTorch (they
serve its compiler), so they are looked for and checked against `F.linear` before they are used. Everywhere else the
plain `F.linear` runs over a buffer that is overwritten in place.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

PACK_ROWS = 64  # the batch size that the blocked layout is chosen for; other batch sizes work with it too


class Linear:
    """y = x Wᵀ + b over [rows, features]. `load` sets or replaces the weights."""

    def __init__(self, dtype: torch.dtype, device: torch.device, *, packed: bool) -> None:
        self._dtype, self._device, self._packed = dtype, device, packed
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None

    def load(self, weights: Sequence[Tensor], biases: Sequence[Tensor] = (), gain: Tensor | None = None) -> None:
        """Copy `weights` ([out_i, in] each, stacked) times `gain` [in], and `biases` ([out_i] each, stacked).

        The product with the gain is taken in fp32 and then cast. Plain weights are overwritten in place; packed ones
        are replaced one layer at a time.
        """
        rows, columns = sum(len(weight) for weight in weights), weights[0].shape[1]
        out = self._weight
        if out is None or self._packed:
            out = torch.empty(rows, columns, dtype=self._dtype, device=self._device)
        for weight, part in zip(weights, out.split([len(weight) for weight in weights]), strict=True):
            _scale_into(part, weight, gain)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(out, PACK_ROWS) if self._packed else out
        self._bias = torch.cat(list(biases)).to(self._device, self._dtype) if biases else None

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed:
            return torch.ops.mkldnn._linear_pointwise.default(x, self._weight, self._bias, "none", [], "")
        return F.linear(x, self._weight, self._bias)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """residual + x Wᵀ + b, in one kernel where there is one."""
        if self._packed:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._weight, self._bias, "add")
        if self._bias is None:
            return torch.addmm(residual, x, self._weight.t())
        return residual + F.linear(x, self._weight, self._bias)


def _scale_into(out: Tensor, weight: Tensor, gain: Tensor | None) -> None:
    if gain is None:
        out.copy_(weight)
    elif weight.device == out.device:
        torch.mul(weight, gain.float(), out=out)  # in fp32 by promotion, cast on the fly: no fp32 copy of the matrix
    else:
        out.copy_(weight.float() * gain.float())


@functools.cache
def packing_works(device_type: str, dtype: torch.dtype) -> bool:
    """Whether the private oneDNN operators exist here and agree with `F.linear` for this dtype."""
    if device_type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 64, generator=generator).to(dtype)
    weight = torch.randn(48, 64, generator=generator).to(dtype)
    bias = torch.randn(48, generator=generator).to(dtype)
    residual = torch.randn(5, 48, generator=generator).to(dtype)
    layer = Linear(dtype, torch.device(device_type), packed=True)
    try:
        layer.load((weight,), (bias,))
        plain, added = layer(x), layer.add(x, residual)
    except (RuntimeError, AttributeError):  # the operator is absent, or this CPU has no kernel for the dtype
        return False
    expected = F.linear(x.float(), weight.float(), bias.float())
    tolerance = {"rtol": 2e-2, "atol": 0.2} if dtype is not torch.float32 else {"rtol": 1e-4, "atol": 1e-4}
    return torch.allclose(plain.float(), expected, **tolerance) and torch.allclose(
        added.float(), expected + residual.float(), **tolerance
    )
