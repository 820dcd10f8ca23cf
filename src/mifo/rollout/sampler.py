"""Exact sampling from logits: two-level inverse CDF, temperature, top-p, greedy.

`torch.multinomial` over a vocabulary of 50k entries takes longer than the rest of a decode step of a small model. Here
the probabilities are summed in chunks, a chunk is found by its cumulative sum, then the token inside the chunk. Sums
within a chunk are fp32 over CHUNK entries, everything cumulative is fp64, so that the tail of a 150k vocabulary keeps
its probability. By construction no index beyond the vocabulary and no token of probability zero can be drawn.

Top-p (Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration", §3.1) is the exact nucleus: the smallest
set of highest-probability tokens whose mass is at least p; equal probabilities are ordered by token index.

Log-probs are those of the distribution the token was drawn from: after temperature and after top-p renormalisation. At
temperature 0 that distribution is a point mass, hence log-prob 0.

Shapes: B rows, V vocabulary, C chunk, N chunks. Not covered: min-p, top-k, repetition penalties (they bias the
gradient).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mifo.types import Sampling

CHUNK = 256
BLOCK_BYTES = 1 << 20  # fp32 bytes that a pass over a block of rows touches on CPU: stays in a core's L2 cache
DRAW_STEPS = 64  # decode steps whose random numbers are drawn at once


class Draw(NamedTuple):
    """One token per row and its log-prob under the sampling distribution: [B] int64 and [B] fp32."""

    token_B: Tensor
    logp_B: Tensor


class Uniforms:
    """Uniform random numbers in [0, 1) for each (prompt, rollout, step), independent of how rows are batched.

    Each prompt has its own `torch.Generator`, seeded from (seed, index of the prompt in the request). The generators
    live on the CPU, so a CUDA engine sees the same numbers as a CPU engine.
    """

    def __init__(self, seed: int, prompts: list[int], n: int) -> None:
        self._generators = [torch.Generator().manual_seed(_mix(seed, index)) for index in prompts]
        self._n = n
        self._first = -DRAW_STEPS
        self._block = torch.empty(0)

    def column(self, step: int, rows: Tensor) -> Tensor:
        """The numbers of decode step `step` for `rows` (numbered prompt by prompt, n each): fp64 [len(rows)].

        Steps are asked for in ascending order.
        """
        if step >= self._first + DRAW_STEPS:
            self._first = step
            draws = [
                torch.rand(self._n, DRAW_STEPS, dtype=torch.float64, generator=generator)
                for generator in self._generators
            ]
            self._block = torch.cat(draws).to(rows.device)
        return self._block[rows, step - self._first]


def _mix(seed: int, index: int) -> int:
    """A seed for one prompt; neighbouring (seed, index) pairs give unrelated streams."""
    return int(np.random.SeedSequence((seed % 2**64, index)).generate_state(1)[0])


def sample(logits_BV: Tensor, sampling: Sampling, uniform_B: Tensor | None) -> Draw:
    """Draw one token per row of `logits_BV` (any float dtype, any V).

    `uniform_B` are fp64 numbers in [0, 1), one per row; the same numbers give the same tokens. It may be None at
    temperature 0. Rows whose logits are not finite get some valid token and a log-prob that is not finite: the caller
    checks.
    """
    B, V = logits_BV.shape
    if logits_BV.device.type == "cpu":
        block = max(1, BLOCK_BYTES // (4 * V))
        starts = range(0, B, block)
    else:
        block, starts = B, range(1)
    draws = []
    for start in starts:
        rows = logits_BV[start : start + block]
        if sampling.temperature == 0:
            draws.append(_greedy(rows))
            continue
        assert uniform_B is not None
        u_B = uniform_B[start : start + block]
        draws.append(_inverse_cdf(rows, u_B, sampling.temperature, sampling.top_p))
    if len(draws) == 1:
        return draws[0]
    return Draw(torch.cat([d.token_B for d in draws]), torch.cat([d.logp_B for d in draws]))


def _padded(logits_BV: Tensor) -> Tensor:
    """An fp32 copy of the logits, padded with -inf to a multiple of CHUNK: no chunk is a remainder."""
    B, V = logits_BV.shape
    width = -(-V // CHUNK) * CHUNK
    if width == V:
        return logits_BV.to(torch.float32, copy=True)
    x = torch.empty(B, width, dtype=torch.float32, device=logits_BV.device)
    x[:, :V] = logits_BV
    x[:, V:] = float("-inf")
    return x


def _greedy(logits_BV: Tensor) -> Draw:
    """The first token of the highest logit. Two levels, as `argmax` over a whole row is several times slower on CPU."""
    B, V = logits_BV.shape
    x_BNC = _padded(logits_BV).view(B, -1, CHUNK)
    top_BN = x_BNC.amax(-1)
    chunk_B = top_BN.argmax(-1)
    inside_B = x_BNC[torch.arange(B, device=chunk_B.device), chunk_B].argmax(-1)
    top_B = top_BN.amax(-1)
    return Draw((chunk_B * CHUNK + inside_B).clamp_(max=V - 1), top_B - top_B)  # 0, or NaN for NaN and inf


def _inverse_cdf(logits_BV: Tensor, u_B: Tensor, temperature: float, top_p: float) -> Draw:
    B, V = logits_BV.shape
    x = _padded(logits_BV)
    top_B1 = x.amax(-1, keepdim=True)
    x.sub_(top_B1)
    if temperature != 1:
        x.div_(temperature)  # after the maximum is taken off: a tiny temperature cannot overflow
    weight_BW = x.exp_()  # unnormalised probabilities, at most 1
    weight_BNC = weight_BW.view(B, -1, CHUNK)
    cumulative_BN = weight_BNC.sum(-1).cumsum(-1, dtype=torch.float64)
    total_B1 = cumulative_BN[:, -1:]
    if top_p < 1:
        token_B, total_B1 = _nucleus(weight_BW[:, :V], total_B1, u_B[:, None], top_p)
    else:
        token_B = _two_level(weight_BNC, cumulative_BN, u_B[:, None]).clamp_(max=V - 1)
    below_top_B1 = (logits_BV.gather(1, token_B[:, None]).float() - top_B1) / temperature
    logp_B = below_top_B1[:, 0] - total_B1[:, 0].log()  # from the logit: no second rounding through the weight
    return Draw(token_B, logp_B.float())


def _two_level(weight_BNC: Tensor, cumulative_BN: Tensor, u_B1: Tensor) -> Tensor:
    chunk_B1 = _first_above(cumulative_BN, u_B1 * cumulative_BN[:, -1:])
    below_B1 = torch.where(chunk_B1 > 0, cumulative_BN.gather(1, (chunk_B1 - 1).clamp_(min=0)), 0.0)
    mass_B1 = cumulative_BN.gather(1, chunk_B1) - below_B1
    share_B1 = (u_B1 * cumulative_BN[:, -1:] - below_B1) / mass_B1  # where in the chunk, 0 to 1
    rows_B = torch.arange(len(weight_BNC), device=weight_BNC.device)
    inside_BC = weight_BNC[rows_B, chunk_B1[:, 0]].cumsum(-1, dtype=torch.float64)
    inside_B1 = _first_above(inside_BC, share_B1.clamp_(min=0) * inside_BC[:, -1:])
    return (chunk_B1 * weight_BNC.shape[-1] + inside_B1)[:, 0]


def _first_above(cumulative_BN: Tensor, target_B1: Tensor) -> Tensor:
    """The first index whose cumulative weight exceeds the target, which therefore has weight of its own.

    If rounding put the target at the total, it is the last index that has weight: never beyond the end, never a zero.
    """
    index_B1 = torch.searchsorted(cumulative_BN, target_B1, right=True)
    last_B1 = torch.searchsorted(cumulative_BN, cumulative_BN[:, -1:].contiguous(), right=False)
    return torch.minimum(index_B1, last_B1).clamp_(max=cumulative_BN.shape[1] - 1)


def _nucleus(weight_BV: Tensor, total_B1: Tensor, u_B1: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """A token from the nucleus [B] and the nucleus' weight [B, 1].

    All tokens below (1 - p)·total/V together weigh less than (1 - p)·total, so the others already hold the nucleus:
    only they are sorted. They are collected in index order and sorted stably, which orders ties by index.
    """
    B, V = weight_BV.shape
    floor_B1 = total_B1 * ((1 - top_p) / V) * (1 - 1e-6)  # a little lower: the sums are rounded
    candidate_BV = weight_BV >= floor_B1
    count_B = candidate_BV.sum(-1)
    row_K, token_K = candidate_BV.nonzero(as_tuple=True)
    start_B = count_B.cumsum(0) - count_B
    column_K = torch.arange(len(row_K), device=row_K.device) - start_B[row_K]
    width = max(1, int(count_B.max()))
    weight_BK = weight_BV.new_zeros(B, width)
    token_BK = token_K.new_zeros(B, width)
    weight_BK[row_K, column_K] = weight_BV[row_K, token_K]
    token_BK[row_K, column_K] = token_K
    sorted_BK, order_BK = weight_BK.sort(dim=-1, descending=True, stable=True)
    cumulative_BK = sorted_BK.cumsum(-1, dtype=torch.float64)
    # a token belongs to the nucleus while the mass before it is still below p
    inside_BK = (cumulative_BK - sorted_BK) < top_p * total_B1
    nucleus_BK = torch.where(inside_BK, sorted_BK.double(), 0.0).cumsum(-1)
    pick_B1 = _first_above(nucleus_BK, u_B1 * nucleus_BK[:, -1:])
    return token_BK.gather(1, order_BK.gather(1, pick_B1))[:, 0], nucleus_BK[:, -1:]
