"""Surgery on weights: fuse two checkpoints, prune a change, reset neurons, drop gradient elements.

    fuse     α θ_over + (1 − α) θ_base                                   base-anchored fusion (S3 eq. 1)
    reset    ω θ_base + (1 − ω) θ_fuse, ω constant over rows or columns   neuron reset (S3 eq. 5)
    prune    θ_0 + m ⊙ (θ_T − θ_0), m ~ Bernoulli(1 − p)                  post-hoc sparsification (S0 §2.2)
    drop     g ← m ⊙ g, m ~ Bernoulli(1 − p) anew at each step            online sparsification (S0 §2.2)

All work on one tensor at a time, so that models larger than memory can be operated on. What is kept or put back has the bits it
came with. Neither prune nor drop rescales by 1/(1 − p), as in the paper. Masks are functions of (seed, step, tensor name), so
they are the same on all ranks and after a resume.

Legend: S neurons of a whole model, one after the other by module.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mifo.core.select import kept_count
from mifo.core.topk import select_top_k
from mifo.errors import NumericsError


def fuse(over: Tensor, base: Tensor, alpha: float) -> Tensor:
    """α·over + (1−α)·base in the wider of both types, computed in fp32 (fp64 for fp64) and rounded once.

    α = 1 and α = 0 give back the input's own bits; elements that are equal in both keep their value for every α. Tensors
    that hold no floating-point numbers are taken from `over`.
    """
    assert over.shape == base.shape
    if not over.dtype.is_floating_point:
        return over
    dtype = torch.promote_types(over.dtype, base.dtype)
    if alpha in (0.0, 1.0):
        return (over if alpha else base).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return torch.lerp(base.to(wide), over.to(wide), alpha).to(dtype)


def reset_neurons(fused: Tensor, base: Tensor, neurons: Tensor, dimension: int) -> Tensor:
    """`fused` with the base's bits in the rows (dimension 0; also of a bias) or columns (dimension 1) of some neurons.

    Args:
        fused: [out, in] or a bias [out].
        base: of the same shape, in no wider type.
        neurons: bool, one for each row or column; True is reset.
        dimension: which index of `fused` counts neurons.
    """
    assert fused.shape == base.shape
    assert neurons.shape == (fused.shape[dimension],)
    shape = [1] * fused.ndim
    shape[dimension] = -1
    return torch.where(neurons.view(shape), base.to(fused.dtype), fused)


def rejuvenated(over: Tensor, base: Tensor, alpha: float, reset: tuple[Tensor, int] | None = None) -> Tensor:
    """Fusion, and the base's bits in the neurons to reset: (mask, dimension) as in `reset_neurons`, or None for none."""
    fused = fuse(over, base, alpha)
    return fused if reset is None else reset_neurons(fused, base, *reset)


def target_places(before_T: Tensor, after_T: Tensor, count: int, *, signed: bool) -> list[int]:
    """Response positions of the N largest |H_over − H_base|, ties to the earlier, in order of position (S3 §3.4).

    Args:
        before_T: entropies of the base, [T].
        after_T: entropies of the over-trained model, [T].
        count: N; fewer where the response is shorter.
        signed: only where the entropy fell.
    """
    fall_T = before_T - after_T
    gap_T = fall_T if signed else fall_T.abs()
    order = torch.argsort(gap_T, descending=True, stable=True)[:count]
    return sorted(place for place in order.tolist() if not signed or fall_T[place] > 0)


def prune(start: Tensor, end: Tensor, keep: Tensor) -> Tensor:
    """θ_0 + m ⊙ (θ_T − θ_0): `end` where `keep`, `start` elsewhere, each in its own bits (no rounding of the difference)."""
    dtype = torch.promote_types(start.dtype, end.dtype)
    return torch.where(keep, end.to(dtype), start.to(dtype))


def top_neurons(scores_S: Tensor, sizes: Sequence[int], fraction: float, *, per_module: bool = False) -> Tensor:
    """The share ρ of neurons with the largest scores, positive ones only (S3 §3.4.2); exact, ties to the earlier neuron.

    Args:
        scores_S: signed attribution scores of all neurons, fp32 [S].
        sizes: neurons of each module, in the order of `scores_S`; they add up to S.
        fraction: ρ in [0, 1]; ⌈ρ·S⌉ neurons are taken, fewer where fewer are positive.
        per_module: take ⌈ρ·n⌉ of every module instead of ranking all modules together.

    Returns:
        bool [S].

    Raises:
        NumericsError: a score is NaN or infinite.
    """
    assert sum(sizes) == len(scores_S)
    if not bool(torch.isfinite(scores_S).all()):
        bad = int((~torch.isfinite(scores_S)).sum())
        raise NumericsError(
            f"neuron selection: {bad} of {len(scores_S)} attribution scores are not finite, so there is no order. Compute the "
            "scores in float32, or check the checkpoint for weights that are not finite."
        )
    positive_S = torch.where(scores_S > 0, scores_S, 0.0).float()  # a clamp may keep −0.0, whose bits are not in order
    pieces = positive_S.split(list(sizes)) if per_module else (positive_S,)
    chosen = [_largest(piece.contiguous(), kept_count(len(piece), fraction)) for piece in pieces]
    return torch.cat(chosen)


def _largest(values: Tensor, count: int) -> Tensor:
    wanted = min(count, int(torch.count_nonzero(values)))
    return select_top_k([values], wanted)[0]


def keep_mask(shape: Sequence[int], rate: float, *, seed: int, step: int, name: str) -> Tensor:
    """m ~ Bernoulli(1 − rate), bool on the CPU; a function of its arguments alone, whatever was drawn before.

    Args:
        shape: of the whole tensor.
        rate: p, the share of elements to drop, in [0, 1].
        seed: of the run or the experiment.
        step: which of its masks; every optimizer step has its own.
        name: the tensor's name.
    """
    digest = hashlib.sha256(f"{seed}/{step}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(tuple(shape), dtype=torch.bool).bernoulli_(1.0 - rate, generator=generator)


@dataclass(frozen=True, slots=True)
class GradientDrop:
    """Online gradient sparsification: g ← m ⊙ g with a fresh mask at each optimizer step, no 1/(1−p) (S0 §2.2).

    Applied to the gradient of the whole update, summed over micro-batches and ranks, before it is clipped. AdamW's moments
    and weight decay act on dropped elements as always: their gradient is zero, they are not frozen.
    """

    rate: float
    seed: int

    @torch.no_grad()
    def apply(self, parameters: Mapping[str, nn.Parameter], step: int) -> None:
        """Clear a random share of each gradient.

        Args:
            parameters: by name; the name is part of the mask's seed.
            step: the optimizer step under way.
        """
        for name, parameter in parameters.items():
            if parameter.grad is not None:
                keep = keep_mask(parameter.shape, self.rate, seed=self.seed, step=step, name=name)
                parameter.grad.masked_fill_(~keep.to(parameter.device), 0.0)
