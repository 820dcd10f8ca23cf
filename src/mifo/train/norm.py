"""RMSNorm as one autograd node that hands its result on in the arithmetic of the layers behind it.

Under autocast the stock module returns fp32, and each of the linear layers that share its result casts it again, forward and
backward. Here the statistics are fp32 (fp64 for fp64) and the result is cast once. On a 2-core Xeon that was 11 ms instead of
54 ms for 4,320 rows of 576, and a 30-layer model has 61 of these.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor, nn

AGREEMENT = 1e-5


class _RmsNorm(torch.autograd.Function):
    """y = x·w / √(mean(x²) + ε) over the last dimension."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float, out_dtype: torch.dtype) -> Tensor:
        high = torch.float64 if x.dtype == torch.float64 else torch.float32
        x_high = x.to(high)
        mean_square = torch.linalg.vector_norm(x_high, dim=-1, keepdim=True).square_().div_(x.shape[-1])
        scale = mean_square.add_(epsilon).rsqrt_()
        unit = x_high * scale
        ctx.save_for_backward(unit, weight, scale)
        ctx.in_dtype = x.dtype
        return torch.mul(unit, weight).to(out_dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        unit, weight, scale = ctx.saved_tensors
        grad = grad.to(unit.dtype)
        grad_weight = (grad * unit).flatten(0, -2).sum(0)
        grad_unit = grad * weight
        projection = (grad_unit * unit).mean(-1, keepdim=True)
        grad_x = grad_unit.addcmul_(unit, projection, value=-1.0).mul_(scale)
        return grad_x.to(ctx.in_dtype), grad_weight.to(weight.dtype), None, None


def _forward(module: Any, hidden_states: Tensor) -> Tensor:
    device = hidden_states.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
    return _RmsNorm.apply(hidden_states, module.weight, module.variance_epsilon, dtype)


def fuse_norms(model: nn.Module) -> int:
    """Give every plain RMSNorm of a model the fused forward; returns how many.

    A module qualifies if it has `weight` and `variance_epsilon` and its own forward agrees with the fused one on random
    rows, so variants that scale by 1 + weight, or subtract a mean, keep theirs.
    """
    norms = [m for m in model.modules() if hasattr(m, "variance_epsilon") and hasattr(m, "weight")]
    fused = 0
    for module in norms:
        if isinstance(module.weight, nn.Parameter) and module.weight.ndim == 1 and _agrees(module):
            module.forward = types.MethodType(_forward, module)
            fused += 1
    return fused


@torch.no_grad()
def _agrees(module: Any) -> bool:
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(4, module.weight.shape[0], generator=generator).to(module.weight)
    own, ours = module(probe), _forward(module, probe)
    return bool(torch.allclose(own, ours.to(own.dtype), rtol=AGREEMENT, atol=AGREEMENT))
