"""Per-token numbers that need the whole distribution, not only the target: of a chunk of rows at a time.

    value_t = g(z_t, y_t, z^ref_t)          z = h Wᵀ

As in `core.logprobs`, the forward pass keeps one number a row, and the backward pass makes the logits of a chunk again, of
rows with a gradient only. A statistic says what g is and what ∂g/∂z is.

Legend: T rows (tokens), D hidden size, V vocabulary, C rows of one chunk. fp32 after the matrix product (fp64 for fp64).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mifo.core.logprobs import logits_of, rows_per_chunk
from mifo.types import VocabularyStatistic

GEM_SLOPE = 0.01  # of the sigmoid in GEM's weights, as in the authors' code


@dataclass(frozen=True, slots=True)
class GemObjective:
    """Σ_v sg(q_v w_v)(log π_v − log π_y), q = softmax(z/β): GEM (Li et al. 2024, `liziniu/GEM`).

    w_v is 1 ("linear") or σ(0.01 (z_v − z_y)) ("logsigmoid"). The normaliser of π cancels: log π_v − log π_y = z_v − z_y.
    """

    beta: float
    weight: Literal["linear", "logsigmoid"]
    needs_reference: ClassVar[bool] = False
    has_gradient: ClassVar[bool] = True

    def value(self, logits_CV: Tensor, target_C: Tensor, reference_CV: Tensor | None) -> Tensor:
        """The objective of each row, [C]."""
        gap_CV = logits_CV - logits_CV.gather(1, target_C[:, None])
        mass_CV = self._mass(logits_CV, gap_CV)
        return torch.where(mass_CV > 0, mass_CV * gap_CV, 0.0).sum(-1)  # an impossible token: 0 times −inf

    def slope(self, logits_CV: Tensor, target_C: Tensor, reference_CV: Tensor | None) -> Tensor:
        """q_v w_v − 1[v = y] Σ q w, [C, V]."""
        mass_CV = self._mass(logits_CV, logits_CV - logits_CV.gather(1, target_C[:, None]))
        return mass_CV.scatter_add(1, target_C[:, None], -mass_CV.sum(-1, keepdim=True))

    def _mass(self, logits_CV: Tensor, gap_CV: Tensor) -> Tensor:
        share_CV = torch.softmax(logits_CV / self.beta, -1)
        return share_CV if self.weight == "linear" else share_CV * torch.sigmoid(GEM_SLOPE * gap_CV)


@dataclass(frozen=True, slots=True)
class KlFromReference:
    """KL(π_ref‖π_θ) = Σ_v π_ref (log π_ref − log π_θ), exact over the vocabulary (ASFT's anchor)."""

    needs_reference: ClassVar[bool] = True
    has_gradient: ClassVar[bool] = True

    def value(self, logits_CV: Tensor, target_C: Tensor, reference_CV: Tensor | None) -> Tensor:
        """The divergence of each row, [C]."""
        assert reference_CV is not None
        logp_CV, ref_CV = logits_CV.log_softmax(-1), reference_CV.log_softmax(-1)
        share_CV = ref_CV.exp()
        return torch.where(share_CV > 0, share_CV * (ref_CV - logp_CV), 0.0).sum(-1)

    def slope(self, logits_CV: Tensor, target_C: Tensor, reference_CV: Tensor | None) -> Tensor:
        """π_θ − π_ref, [C, V]."""
        assert reference_CV is not None
        return logits_CV.softmax(-1) - reference_CV.softmax(-1)


@dataclass(frozen=True, slots=True)
class TopLogitEntropy:
    """Entropy of the `count` largest logits, renormalised among themselves; a constant to the gradient (EAFT)."""

    count: int
    needs_reference: ClassVar[bool] = False
    has_gradient: ClassVar[bool] = False

    def value(self, logits_CV: Tensor, target_C: Tensor, reference_CV: Tensor | None) -> Tensor:
        """The entropy of each row in nats, [C]."""
        top_CK = logits_CV.topk(min(self.count, logits_CV.shape[-1]), dim=-1).values
        logp_CK = top_CK.log_softmax(-1)
        share_CK = logp_CK.exp()
        return -torch.where(share_CK > 0, share_CK * logp_CK, 0.0).sum(-1)

    def slope(self, logits_CV: Tensor, target_C: Tensor, reference_CV: Tensor | None) -> Tensor:
        """Zero: nothing asks for it."""
        return torch.zeros_like(logits_CV)


@dataclass(frozen=True, slots=True)
class Rows:
    """Hidden states that predict, [T, D], and the output layer that makes logits of them."""

    hidden_TD: Tensor
    weight_VD: Tensor
    bias_V: Tensor | None = None

    def cast(self) -> Rows:
        """With the output layer in the type of the hidden states: once for all chunks."""
        dtype = self.hidden_TD.dtype
        return Rows(self.hidden_TD, self.weight_VD.to(dtype), None if self.bias_V is None else self.bias_V.to(dtype))

    def logits(self, rows: Tensor) -> Tensor:
        """Logits of the chosen rows, [C, V]; of rows that are cast."""
        return logits_of(self.hidden_TD[rows], self.weight_VD, self.bias_V)


def vocabulary_statistic(
    statistic: VocabularyStatistic,
    policy: Rows,
    target_T: Tensor,
    reference: Rows | None = None,
    *,
    chunk_rows: int | None = None,
) -> Tensor:
    """The statistic of every row, [T], differentiable in the policy's hidden states and output layer if it has a gradient.

    Args:
        statistic: what to compute of a row of logits.
        policy: the rows.
        target_T: the ids that follow, int64 [T].
        reference: the same positions of the reference model, for a statistic that compares with it.
        chunk_rows: rows of logits held at once; the result does not depend on it beyond rounding.
    """
    assert (reference is not None) == statistic.needs_reference
    chunk = chunk_rows or rows_per_chunk(policy.weight_VD.shape[0])
    with torch.set_grad_enabled(statistic.has_gradient and torch.is_grad_enabled()):
        value_T: Tensor = _Statistic.apply(  # type: ignore[no-untyped-call]
            policy.hidden_TD,
            policy.weight_VD,
            policy.bias_V,
            target_T,
            statistic,
            None if reference is None else reference.cast(),
            chunk,
        )
    return value_T


class _Statistic(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor | None,
        target_T: Tensor,
        statistic: VocabularyStatistic,
        reference: Rows | None,
        chunk: int,
    ) -> Tensor:
        ctx.save_for_backward(hidden_TD, weight_VD, bias_V, target_T)
        ctx.statistic, ctx.reference, ctx.chunk = statistic, reference, chunk
        policy = Rows(hidden_TD, weight_VD, bias_V).cast()
        parts = [
            statistic.value(policy.logits(rows), target_T[rows], None if reference is None else reference.logits(rows))
            for rows in torch.arange(len(target_T), device=target_T.device).split(chunk)
        ]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (slope_T,) = grads
        hidden_TD, weight_VD, bias_V, target_T = ctx.saved_tensors
        reference: Rows | None = ctx.reference
        policy = Rows(hidden_TD, weight_VD, bias_V).cast()
        grad_hidden, grad_weight = torch.zeros_like(hidden_TD), torch.zeros_like(weight_VD)
        grad_bias = None if bias_V is None else torch.zeros_like(bias_V)
        for rows in slope_T.nonzero()[:, 0].split(ctx.chunk):
            ref_CV = None if reference is None else reference.logits(rows)
            grad_CV = ctx.statistic.slope(policy.logits(rows), target_T[rows], ref_CV) * slope_T[rows, None]
            low_CV = grad_CV.to(hidden_TD.dtype)
            grad_hidden[rows] = low_CV @ policy.weight_VD
            grad_weight += low_CV.t() @ hidden_TD[rows]
            if grad_bias is not None:
                grad_bias += grad_CV.sum(0).to(grad_bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None, None, None
