"""Keys and values of the decode loop, and attention over them.

Two layouts with one interface. Both hold keys and values of a row side by side, [rows, slots, 2·K, head], so that a
step writes them with one copy; prompts are padded on the right, so that the first own token follows at slot P.

- `SharedPrefix` keeps the prompt once per group. A query attends to the prompt and to the row's own tokens apart, and
  the two results are merged by their log-sum-exps (the online softmax of Milakov and Gimelshein 2018, arXiv
  1805.02867, applied to two blocks). All queries of a group share one pass over the prompt. It needs PyTorch's CPU
  flash kernel, which returns the log-sum-exp; the operator is private, so it is checked before use.
- `FlatPrefix` copies the prompt to every row and calls `scaled_dot_product_attention`: any device, and groups of one.

Shapes: L layers, U prompts, B rows, P prompt slots, T own slots, H query heads, K key heads, G = H/K, d head size.
"""

from __future__ import annotations

import functools
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

FIRST_SLOTS = 64  # own slots to begin with; doubled when they run out
SHARED_MIN_ROWS = 2.0  # rows per prompt from which sharing the prompt pays for the second attention call


class Cache(Protocol):
    """Keys and values after the prompts were read."""

    def begin(self, step: int) -> None:
        """Make room for own token number `step` (0-based) of every row."""

    def attend(self, layer: int, query_BHd: Tensor, kv_BSd: Tensor) -> Tensor:
        """Store this step's keys and values [B, 2K, d] and return the attention output [B, H·d]."""

    def keep(self, target: int, destination: Tensor, source: Tensor) -> None:
        """Move rows `source` to `destination` and forget the rows from `target` on."""


def make_cache(prompt: Tensor, lengths_U: Tensor, group_B: Tensor, query_heads: int, slots: int) -> Cache:
    """A cache for rows that continue prompts.

    Args:
        prompt: keys and values of the prompts [L, U, P, 2K, d].
        lengths_U: real tokens of each prompt, int64 on the device of `prompt`.
        group_B: the prompt of each row.
        query_heads: H.
        slots: the most own tokens a row can get.
    """
    shared = len(group_B) >= SHARED_MIN_ROWS * len(lengths_U)
    if shared and prompt.device.type == "cpu" and flash_works(prompt.dtype):
        return SharedPrefix(prompt, lengths_U, group_B, query_heads, slots)
    return FlatPrefix(prompt, lengths_U, group_B, slots)


def _additive(valid: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(valid.shape, dtype=dtype, device=valid.device).masked_fill_(~valid, float("-inf"))


class _Slots:
    """Rows of keys and values [L, B, slots, 2K, d] that grow by doubling and shrink in place."""

    def __init__(self, shape: tuple[int, int, int, int, int], limit: int, like: Tensor) -> None:
        self._limit = limit
        self.buffer = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.rows = shape[1]
        self._bind()

    def _bind(self) -> None:
        """Per-layer views, made once rather than at every step."""
        kv_heads = self.buffer.shape[3] // 2
        self.layers = [layer[: self.rows] for layer in self.buffer]
        self.keys = [layer[:, :, :kv_heads].transpose(1, 2) for layer in self.layers]
        self.values = [layer[:, :, kv_heads:].transpose(1, 2) for layer in self.layers]

    def reserve(self, used: int) -> None:
        """Room for slot number `used`; the slots below it are kept."""
        L, _, slots, heads, size = self.buffer.shape
        if used < slots:
            return
        wider = min(self._limit, used + max(FIRST_SLOTS, used))
        larger = self.buffer.new_empty(L, self.rows, wider, heads, size)
        larger[:, :, :used] = self.buffer[:, : self.rows, :used]
        self.buffer = larger
        self._bind()

    def keep(self, target: int, destination: Tensor, source: Tensor, used: int) -> None:
        self.buffer[:, destination, :used] = self.buffer[:, source, :used]
        self.rows = target
        self._bind()


class FlatPrefix:
    """The prompt copied to every row; attention by `scaled_dot_product_attention`."""

    def __init__(self, prompt: Tensor, lengths_U: Tensor, group_B: Tensor, slots: int) -> None:
        L, _, P, heads, size = prompt.shape
        first = P + min(slots, FIRST_SLOTS)
        self._prompt, self._limit = P, P + slots
        self._slots = _Slots((L, len(group_B), first, heads, size), self._limit, prompt)
        self._slots.buffer[:, :, :P] = prompt[:, group_B]
        self._mask: Tensor | None = None
        if int(lengths_U.min()) < P:
            slot_S = torch.arange(self._limit, device=prompt.device)
            valid_BS = (slot_S < lengths_U[group_B, None]) | (slot_S >= P)
            self._mask = _additive(valid_BS, prompt.dtype)[:, None, None]
        self._slot = P

    def begin(self, step: int) -> None:
        self._slot = self._prompt + step
        self._slots.reserve(self._slot)
        self._step_mask = None if self._mask is None else self._mask[..., : self._slot + 1]

    def attend(self, layer: int, query_BHd: Tensor, kv_BSd: Tensor) -> Tensor:
        self._slots.layers[layer][:, self._slot] = kv_BSd
        used = self._slot + 1
        keys, values = self._slots.keys[layer][:, :, :used], self._slots.values[layer][:, :, :used]
        out = F.scaled_dot_product_attention(
            query_BHd.unsqueeze(2), keys, values, attn_mask=self._step_mask, enable_gqa=True
        )
        return out.reshape(len(query_BHd), -1)

    def keep(self, target: int, destination: Tensor, source: Tensor) -> None:
        self._slots.keep(target, destination, source, self._slot + 1)
        if self._mask is not None:
            self._mask[destination] = self._mask[source]
            self._mask = self._mask[:target]


class SharedPrefix:
    """The prompt kept once per group (CPU)."""

    def __init__(self, prompt: Tensor, lengths_U: Tensor, group_B: Tensor, query_heads: int, slots: int) -> None:
        L, _, P, heads, size = prompt.shape
        self._kv_heads, self._query_heads, self._size = heads // 2, query_heads, size
        self._own = _Slots((L, len(group_B), min(slots, FIRST_SLOTS), heads, size), slots, prompt)
        self._prompt = prompt
        self._mask: Tensor | None = None
        if int(lengths_U.min()) < P:
            valid_UP = torch.arange(P, device=prompt.device) < lengths_U[:, None]
            self._mask = _additive(valid_UP, prompt.dtype)[:, None, None]
        self._group_B = group_B.clone()
        self._slot = 0
        self._regroup()

    def _regroup(self) -> None:
        """Place every row in a table [groups, most rows of a group]; groups without rows are dropped."""
        alive, group_B, count_U = torch.unique(self._group_B, return_inverse=True, return_counts=True)
        if len(alive) < self._prompt.shape[1]:
            self._prompt = self._prompt[:, alive]
            self._mask = None if self._mask is None else self._mask[alive]
            self._group_B = group_B
        U, width = len(alive), int(count_U.max())
        order_B = group_B.argsort(stable=True)
        start_U = count_U.cumsum(0) - count_U
        column_B = torch.arange(len(group_B)) - start_U[group_B[order_B]]
        place_B = torch.empty_like(order_B)
        place_B[order_B] = group_B[order_B] * width + column_B
        table = torch.zeros(U * width, dtype=torch.int64)  # an empty place repeats row 0: computed, never read
        table[place_B] = torch.arange(len(group_B))
        in_order = len(table) == len(place_B) and torch.equal(place_B, torch.arange(len(place_B)))
        self._table, self._place_B = (None, None) if in_order else (table, place_B)
        self._grid = (U, width)
        K = self._kv_heads
        self._prompt_keys = [layer[:, :, :K].transpose(1, 2) for layer in self._prompt]
        self._prompt_values = [layer[:, :, K:].transpose(1, 2) for layer in self._prompt]

    def begin(self, step: int) -> None:
        self._slot = step
        self._own.reserve(step)

    def attend(self, layer: int, query_BHd: Tensor, kv_BSd: Tensor) -> Tensor:
        self._own.layers[layer][:, self._slot] = kv_BSd
        used = self._slot + 1
        own, own_lse = _flash(
            query_BHd.unsqueeze(2), self._own.keys[layer][:, :, :used], self._own.values[layer][:, :, :used], None
        )
        prompt, prompt_lse = self._attend_prompt(layer, query_BHd)
        share = torch.sigmoid_(prompt_lse - own_lse).to(own.dtype)
        return torch.lerp(own[:, :, 0], prompt, share).view(len(query_BHd), -1)

    def _attend_prompt(self, layer: int, query_BHd: Tensor) -> tuple[Tensor, Tensor]:
        """Output [B, H, d] and log-sum-exp [B, H, 1] over the prompt. The G queries of a key head of all rows of a
        group are one block of the kernel."""
        U, width = self._grid
        K, H, d = self._kv_heads, self._query_heads, self._size
        G = H // K
        rows = query_BHd if self._table is None else query_BHd[self._table]
        block = rows.view(U, width, K, G, d).transpose(1, 2).reshape(U, K, width * G, d)
        out, lse = _flash(block, self._prompt_keys[layer], self._prompt_values[layer], self._mask)
        out = out.reshape(U, K, width, G, d).transpose(1, 2).reshape(U * width, H, d)
        lse = lse.reshape(U, K, width, G).transpose(1, 2).reshape(U * width, H, 1)
        if self._place_B is None:
            return out, lse
        return out[self._place_B], lse[self._place_B]

    def keep(self, target: int, destination: Tensor, source: Tensor) -> None:
        self._own.keep(target, destination, source, self._slot + 1)
        self._group_B[destination] = self._group_B[source]
        self._group_B = self._group_B[:target]
        self._regroup()


def _flash(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """PyTorch's CPU flash kernel: output as `query` [B, H, q, d], log-sum-exp [B, H, q] in fp32."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
        query, key, value, 0.0, False, attn_mask=mask
    )


@functools.cache
def flash_works(dtype: torch.dtype) -> bool:
    """Whether the private kernel exists, takes fewer key heads than query heads, and returns the log-sum-exp we merge
    by."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 3, 16, generator=generator).to(dtype)
    key, value = (torch.randn(2, 2, 5, 16, generator=generator).to(dtype) for _ in range(2))
    mask = torch.zeros(2, 1, 1, 5, dtype=dtype)
    mask[1, ..., 3:] = float("-inf")
    try:
        out, lse = _flash(query, key, value, mask)
    except (RuntimeError, AttributeError):
        return False
    keys, values = (t.float().repeat_interleave(2, dim=1) for t in (key, value))
    scores = query.float() @ keys.transpose(-1, -2) / 4 + mask.float()
    expected = scores.softmax(-1) @ values
    tolerance = 1e-4 if dtype is torch.float32 else 3e-2
    return (
        out.shape == expected.shape
        and torch.allclose(out.float(), expected, atol=tolerance)
        and torch.allclose(lse.float(), scores.logsumexp(-1), atol=tolerance)
    )
