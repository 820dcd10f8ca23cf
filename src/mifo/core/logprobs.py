"""Token log-probabilities and entropies from hidden states, without a [tokens, vocabulary] tensor.

    log p_t = z_t[y_t] − lse(z_t)          H_t = lse(z_t) − Σ_v softmax(z_t)_v z_t[v]          z = h Wᵀ

The forward pass walks over rows in chunks and keeps two numbers a row. The backward pass makes the logits of a chunk
again, and only of rows whose incoming gradient is not zero: tokens that a selection left out, and groups without an
advantage, never meet it. What is recomputed is one matrix product in four; what is saved is V numbers a token.

Legend: T rows (tokens), D hidden size, V vocabulary, C rows of one chunk. Entropies are at temperature 1 over the whole
vocabulary. Logits are made in the dtype of `hidden_TD`, everything after them in fp32 (fp64 for fp64).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_ELEMENTS = 1 << 24  # logits held at once: 64 MiB in fp32


def rows_per_chunk(vocabulary: int) -> int:
    """How many rows of logits are held at once."""
    return max(8, CHUNK_ELEMENTS // vocabulary)


def token_logprobs(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    target_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    chunk_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each distribution, both differentiable.

    Args:
        hidden_TD: final hidden states of the positions that predict, [T, D].
        weight_VD: output embedding, [V, D]; cast to the dtype of `hidden_TD`, its gradient returned in its own.
        target_T: the ids that follow, int64 [T].
        bias_V: bias of the output layer, or None.
        chunk_rows: rows of logits held at once; the result does not depend on it beyond rounding.

    Returns:
        (logp_T, entropy_T) in nats, fp32 (fp64 if the hidden states are).
    """
    assert hidden_TD.ndim == 2
    assert hidden_TD.shape[0] == target_T.shape[0]
    chunk = chunk_rows or rows_per_chunk(weight_VD.shape[0])
    logp_T, entropy_T = _Head.apply(hidden_TD, weight_VD, bias_V, target_T, chunk)  # type: ignore[no-untyped-call]
    return logp_T, entropy_T


def logits_of(hidden_CD: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    """Logits of a chunk of rows, [C, V], in fp32 (fp64 if the hidden states are)."""
    logits_CV = F.linear(hidden_CD, weight_VD, bias_V)
    return logits_CV if logits_CV.dtype == torch.float64 else logits_CV.float()


def _statistics(logits_CV: Tensor, target_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log-prob, entropy, log-sum-exp) of one chunk; `logits_CV` is overwritten."""
    top_C = logits_CV.amax(dim=-1)
    shifted_CV = logits_CV.sub_(top_C[:, None])
    chosen_C = shifted_CV.gather(1, target_C[:, None])[:, 0]
    exp_CV = shifted_CV.exp()
    sum_C = exp_CV.sum(dim=-1)
    dot_C = torch.mul(exp_CV, shifted_CV, out=exp_CV).sum(dim=-1)
    if bool(dot_C.isnan().any()):  # an impossible token: p = 0 times log p = −inf, which counts as 0
        dot_C = exp_CV.nan_to_num_(nan=0.0, posinf=float("inf"), neginf=float("-inf")).sum(dim=-1)
    log_sum_C = sum_C.log()
    return chosen_C - log_sum_C, log_sum_C - dot_C / sum_C, top_C + log_sum_C


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_TD: Tensor, weight_VD: Tensor, bias_V: Tensor | None, target_T: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        weight = weight_VD.to(hidden_TD.dtype)
        bias = None if bias_V is None else bias_V.to(hidden_TD.dtype)
        parts = [
            _statistics(logits_of(hidden_TD[i : i + chunk], weight, bias), target_T[i : i + chunk])
            for i in range(0, len(target_T), chunk)
        ]
        empty = hidden_TD.new_zeros(0, dtype=torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32)
        logp_T, entropy_T, lse_T = (torch.cat([p[i] for p in parts]) if parts else empty.clone() for i in range(3))
        ctx.save_for_backward(hidden_TD, weight, weight_VD, bias, target_T, lse_T, entropy_T)
        ctx.chunk = chunk
        return logp_T, entropy_T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None, None]:
        grad_logp_T, grad_entropy_T = grads
        hidden_TD, weight, weight_VD, bias, target_T, lse_T, entropy_T = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden_TD)
        grad_weight = torch.zeros_like(weight_VD) if ctx.needs_input_grad[1] else None
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=lse_T.dtype)
        live = ((grad_logp_T != 0) | (grad_entropy_T != 0)).nonzero()[:, 0]
        for rows in live.split(ctx.chunk):
            hidden = hidden_TD[rows]
            shifted_CV = logits_of(hidden, weight, bias).sub_(lse_T[rows, None])
            slope_C, entropy_slope_C = grad_logp_T[rows, None], grad_entropy_T[rows, None]
            # ∂log p_y/∂z = 1[y] − p        ∂H/∂z = −p (log p + H)
            if bool((entropy_slope_C != 0).any()):
                scale_CV = (shifted_CV + entropy_T[rows, None]).mul_(-entropy_slope_C).sub_(slope_C)
                grad_logits = scale_CV.mul_(shifted_CV.exp_())
            else:
                grad_logits = shifted_CV.exp_().mul_(-slope_C)
            grad_logits.scatter_add_(1, target_T[rows, None], slope_C)
            grad_low = grad_logits.to(hidden.dtype)
            grad_hidden[rows] = grad_low @ weight
            if grad_weight is None:
                pass
            elif grad_low.dtype == grad_weight.dtype:
                grad_weight.addmm_(grad_low.t(), hidden)  # no [V, D] product beside the sum
            else:
                grad_weight += grad_low.t() @ hidden  # bf16 products are added up in the weight's own fp32
            if grad_bias is not None:
                grad_bias += grad_logits.sum(0)
        return grad_hidden, grad_weight, None if grad_bias is None else grad_bias.to(weight.dtype), None, None
