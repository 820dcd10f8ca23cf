"""Attention per sequence over a packed row, registered with transformers under `mifo_packed`.

A row is a chain of segments: a prompt, then runs of responses to it, then the next prompt. A prompt attends to itself; a
response attends to its prompt and to itself. The responses of a run have similar lengths and go through one call, padded to
the longest: a padded key stands after every real query, so the causal mask already hides it.

Short calls on the CPU use plain matrix products with scores in fp32: there the backward pass of the fused kernel with a mask
takes three times as long (64 queries, 100 keys, 9 heads; torch 2.13).

Legend: N tokens of the row, R responses of a run, L longest of them, P prompt length, H query heads, K key heads, d head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mifo.data.pack import Branch

PACKED_ATTENTION = "mifo_packed"
RUN_WASTE = 1.25  # a run ends before padding would exceed a quarter
NO_MASK = (1, 1, 1, 1)  # shape of a stand-in: transformers takes a 4-d mask as it is instead of making an N × N one
SHORT_KEYS = 512  # up to here plain products beat the fused kernel on the CPU


@dataclass(frozen=True, slots=True)
class _Run:
    """Neighbouring responses of similar length. `pad` and `unpad` are None where all are equally long."""

    count: int
    longest: int
    tokens: int
    pad: Tensor | None
    unpad: Tensor | None


@dataclass(frozen=True, slots=True)
class _Chain:
    """A prompt and the runs behind it; `prompt` includes the response where there is only one."""

    prompt: int
    runs: tuple[_Run, ...]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """What attends to what in one micro-batch; made once and used by every layer."""

    chains: tuple[_Chain, ...]

    @property
    def sizes(self) -> list[int]:
        """Lengths of the row's segments, in order."""
        return [size for chain in self.chains for size in (chain.prompt, *(run.tokens for run in chain.runs))]


def plan_attention(branches: Sequence[Branch], device: torch.device) -> AttentionPlan:
    """Segments of a micro-batch laid out by `data.pack`."""
    return AttentionPlan(tuple(_chain(branch, device) for branch in branches))


def _chain(branch: Branch, device: torch.device) -> _Chain:
    lengths = [length for _, length in branch.responses if length > 0]
    if len(lengths) == 1:  # plain causal attention over prompt and response together
        return _Chain(branch.prompt_length + lengths[0], ())
    runs: list[list[int]] = []
    for length in lengths:
        grown = [*runs[-1], length] if runs else []
        if runs and max(grown) * len(grown) <= RUN_WASTE * sum(grown):
            runs[-1].append(length)
        else:
            runs.append([length])
    return _Chain(branch.prompt_length, tuple(_run(run, device) for run in runs))


def _run(lengths: list[int], device: torch.device) -> _Run:
    longest, total = max(lengths), sum(lengths)
    if min(lengths) == longest:
        return _Run(len(lengths), longest, total, None, None)
    ends = torch.tensor(lengths).cumsum(0)
    steps = torch.arange(longest)
    sizes = torch.tensor(lengths)[:, None]
    pad = (ends[:, None] - sizes) + torch.minimum(steps[None], sizes - 1)
    unpad = (steps[None] < sizes).reshape(-1).nonzero()[:, 0]
    return _Run(len(lengths), longest, total, pad.reshape(-1).to(device), unpad.to(device))


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    attention_plan: AttentionPlan | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer over a packed row, in the signature transformers calls.

    Args:
        query: [1, H, N, d]; `key` and `value` are [1, K, N, d].
        attention_plan: from `plan_attention`, passed through the model's keyword arguments. Without one the call is an
            ordinary one (an evaluation, `generate`) and goes to transformers' own attention.

    Returns:
        [1, N, H, d] and None for the attention weights.
    """
    if attention_plan is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **options)
    _check_plain(module, options)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # [N, heads, d] pieces: the backward pass of one split is one concatenation, whatever the number of pieces.
    queries, keys, values = (iter(t[0].transpose(0, 1).split(attention_plan.sizes)) for t in (query, key, value))
    out: list[Tensor] = []
    for chain in attention_plan.chains:
        prompt_key, prompt_value = next(keys), next(values)
        out.append(_attend(next(queries)[None], prompt_key[None], prompt_value[None], scale)[0])
        for run in chain.runs:
            run_key, run_value = next(keys), next(values)
            key_RPL = torch.cat([prompt_key.expand(run.count, *prompt_key.shape), _padded(run_key, run)], dim=1)
            value_RPL = torch.cat([prompt_value.expand(run.count, *prompt_value.shape), _padded(run_value, run)], dim=1)
            rows = _attend(_padded(next(queries), run), key_RPL, value_RPL, scale).flatten(0, 1)
            out.append(rows if run.unpad is None else rows.index_select(0, run.unpad))
    return torch.cat(out)[None], None


def _check_plain(module: nn.Module, options: Mapping[str, Any]) -> None:
    """Refuse what a model asks of its attention beyond a causal mask: ignoring it would train another model.

    Raises:
        ValueError: names it.
    """
    window = options.get("sliding_window")
    asked = [f"{name} = {options[name]}" for name in ("softcap", "s_aux") if options.get(name) is not None]
    if window is not None and window < module.config.max_position_embeddings:
        asked.append(f"a sliding window of {window}")
    if asked:
        raise ValueError(f"attention with {', '.join(asked)} is not plain causal attention")


def _padded(piece: Tensor, run: _Run) -> Tensor:
    """[tokens, heads, d] to [R, L, heads, d]."""
    rows = piece if run.pad is None else piece.index_select(0, run.pad)
    return rows.reshape(run.count, run.longest, *piece.shape[1:])


def _attend(query_RLHd: Tensor, key_RMKd: Tensor, value_RMKd: Tensor, scale: float) -> Tensor:
    """Causal attention, the last query aligned with the last key; [R, L, H, d]."""
    length, keys = query_RLHd.shape[1], key_RMKd.shape[1]
    if query_RLHd.device.type == "cpu" and keys <= SHORT_KEYS:
        return _attend_plain(query_RLHd, key_RMKd, value_RMKd, scale)
    causal = length == keys
    mask = None if causal else torch.ones(length, keys, dtype=torch.bool, device=query_RLHd.device).tril(keys - length)
    # Rotary embedding leaves queries and keys in fp32 under autocast; the fused kernels want one dtype.
    query_RLHd, key_RMKd = query_RLHd.to(value_RMKd.dtype), key_RMKd.to(value_RMKd.dtype)
    out = F.scaled_dot_product_attention(
        query_RLHd.transpose(1, 2),
        key_RMKd.transpose(1, 2),
        value_RMKd.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=True,
    )
    return out.transpose(1, 2)


def _attend_plain(query_RLHd: Tensor, key_RMKd: Tensor, value_RMKd: Tensor, scale: float) -> Tensor:
    rows, length, heads, size = query_RLHd.shape
    keys, groups = key_RMKd.shape[1], key_RMKd.shape[2]
    ratio = heads // groups
    with torch.autocast("cpu", enabled=False):
        query = query_RLHd.reshape(rows, length, groups, ratio, size).permute(0, 2, 3, 1, 4)
        query = query.reshape(rows, groups, ratio * length, size)
        high = torch.float32 if query.dtype == torch.bfloat16 else query.dtype
        scores = torch.matmul((query.to(high) * scale), key_RMKd.permute(0, 2, 3, 1).to(high))
        hidden = torch.ones(length, keys, dtype=torch.bool).triu(keys - length + 1)
        scores = scores.view(rows, groups, ratio, length, keys).masked_fill(hidden, float("-inf"))
        probs = scores.softmax(-1).to(value_RMKd.dtype).view(rows, groups, ratio * length, keys)
        out = torch.matmul(probs, value_RMKd.transpose(1, 2))
    return out.view(rows, groups, ratio, length, size).permute(0, 3, 1, 2, 4).reshape(rows, length, heads, size)


AttentionInterface.register(PACKED_ATTENTION, packed_attention)
AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)  # for ordinary calls; a packed one brings NO_MASK
