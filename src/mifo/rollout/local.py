"""The embedded engine: a decode loop over its own copy of the weights of a Llama-family model.

What makes it fast: prompts of a group are read once; q, k, v and gate, up are one matrix product each; norm gains are
folded away; only the last position meets the head; finished rows leave the batch; sampling is a two-level inverse
CDF. It is exact: in fp32 its greedy tokens are those of `generate` and its log-probs those of a full forward pass. In
bf16 it rounds in other places than the trainer, and the gap is measured at every step of a run.

Which models it runs: `weights.why_unsupported`. Device-agnostic; on CPU it uses oneDNN's packed weights and a shared
prompt cache where they are found to work. Not covered: several devices for one model, refilling freed rows with new
prompts.

Shapes: U prompts of a batch, B rows (live responses), P prompt slots, H, K query and key heads, d head size, V
vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mifo.errors import ModelError
from mifo.rollout.cache import Cache, make_cache
from mifo.rollout.request import Limits, Span, check_request, plan_batches
from mifo.rollout.results import make_rollouts
from mifo.rollout.sampler import Uniforms, sample
from mifo.rollout.weights import Layer, Weights, why_unsupported
from mifo.types import Rollout, Sampling, TokenIds

PREFILL_TOKENS = 8192  # padded prompt tokens read at a time: bounds the activations of long prompts
ROW_MULTIPLE = 8  # the batch shrinks to multiples of this: matrix kernels are compiled per batch size and work in tiles


class LocalEngine:
    """Rollouts from a copy of a model's weights; see the module. `version` is that of the last `update`."""

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_batch_rows: int | None = None,
        compact: bool = True,
    ) -> None:
        """Copy `model`'s weights as version 0.

        Args:
            model: a transformers causal language model; not kept.
            dtype: of weights, keys and values, and logits in the engine; float32 or bfloat16.
            device: where the engine computes; may differ from the model's.
            max_batch_rows: the most responses decoded at once; None for no limit.
            compact: let finished rows leave the batch.

        Raises:
            ModelError: the architecture is not covered.
        """
        reason = why_unsupported(model)
        if reason is not None:
            raise ModelError(f"the local rollout engine cannot run this model: {reason}; use the engine 'generate'")
        self._limits = Limits(context=model.config.max_position_embeddings, vocab_size=model.config.vocab_size)
        self._weights = Weights(model, dtype, device)
        self._rotary = copy.deepcopy(model.model.rotary_emb).to(device)
        self._cos = self._sin = torch.empty(0)
        self._max_batch_rows, self._compact = max_batch_rows, compact
        self.update(model, version=0)

    def update(self, model: nn.Module, version: int) -> None:
        """Copy the weights in. Later changes of `model` do not reach the engine until the next update."""
        self._weights.load(model)
        self.version = version

    @torch.inference_mode()
    def generate(self, prompts: Sequence[TokenIds], n: int, sampling: Sampling, seed: int) -> list[tuple[Rollout, ...]]:
        """`n` rollouts for each prompt, in prompt order. The random numbers of a rollout depend on (seed, prompt's
        index, rollout's index) alone.

        Raises:
            ConfigError, DataError: see `request.check_request`.
            NumericsError: the model's logits are not finite.
        """
        check_request(prompts, n, sampling, self._limits)
        found: dict[int, list[Rollout]] = {index: [] for index in range(len(prompts))}
        longest = max((len(prompt) for prompt in prompts), default=0)
        self._extend_rope(longest + sampling.max_tokens)
        for spans in plan_batches(prompts, n, self._max_batch_rows):
            decode = _Decode(self, prompts, spans, sampling, seed, n)
            for index, rollouts in decode.run():
                found[index].extend(rollouts)
        return [tuple(found[index]) for index in range(len(prompts))]

    def _extend_rope(self, length: int) -> None:
        """Tables [length, d] from the model's own rotary module; sin carries the sign of rotate_half's first half."""
        if length <= len(self._cos):
            return
        position = torch.arange(max(length, 2 * len(self._cos)), device=self._weights.device)[None]
        cos, sin = self._rotary(torch.empty(1, device=self._weights.device), position)
        sign = torch.ones(self._weights.head_dim, device=sin.device)
        sign[: len(sign) // 2] = -1
        dtype = self._weights.dtype
        self._cos, self._sin = cos[0].to(dtype)[:, None], (sin[0] * sign).to(dtype)[:, None]

    def _norm(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], None, self._weights.eps)

    def _project(self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Queries, keys and values [rows, H + 2K, d] of hidden states [rows, D], rotated; cos and sin [rows, 1, d]."""
        w = self._weights
        qkv = layer.qkv(self._norm(x)).view(len(x), -1, w.head_dim)
        rotated = qkv[:, : w.heads + w.kv_heads]
        source = rotated if layer.head_gain is None else self._norm(rotated) * layer.head_gain
        torch.addcmul(source * cos, torch.roll(source, w.head_dim // 2, -1), sin, out=rotated)
        return qkv

    def _feed_forward(self, layer: Layer, x: Tensor) -> Tensor:
        gate, up = layer.gate_up(self._norm(x)).chunk(2, -1)
        return layer.down.add(F.silu(gate).mul_(up), x)

    def prefill(self, prompts: Sequence[TokenIds]) -> tuple[Tensor, Tensor]:
        """Read the prompts: keys and values [L, U, P, 2K, d] and the logits of the next token [U, V]."""
        w = self._weights
        P = max(len(prompt) for prompt in prompts)
        cache = torch.empty(len(w.layers), len(prompts), P, 2 * w.kv_heads, w.head_dim, dtype=w.dtype, device=w.device)
        at_once = max(1, PREFILL_TOKENS // P)
        logits = [
            self._prefill_some(prompts[i : i + at_once], cache[:, i : i + at_once])
            for i in range(0, len(prompts), at_once)
        ]
        return cache, torch.cat(logits)

    def _prefill_some(self, prompts: Sequence[TokenIds], cache: Tensor) -> Tensor:
        """Prompts are padded on the right, where a causal mask keeps padding from every real token."""
        w = self._weights
        U, P = cache.shape[1:3]
        ids = torch.tensor([[*prompt, *([0] * (P - len(prompt)))] for prompt in prompts], device=w.device)
        x = F.embedding(ids.view(-1), w.embedding)
        cos, sin = (table[:P].repeat(U, 1, 1) for table in (self._cos, self._sin))
        for layer, stored in zip(w.layers, cache, strict=True):
            qkv = self._project(layer, x, cos, sin).view(U, P, -1, w.head_dim)
            stored.copy_(qkv[:, :, w.heads :])
            query, key, value = qkv.transpose(1, 2).split((w.heads, w.kv_heads, w.kv_heads), dim=1)
            out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
            x = layer.out.add(out.transpose(1, 2).reshape(U * P, -1), x)
            x = self._feed_forward(layer, x)
        last = torch.tensor([i * P + len(prompt) - 1 for i, prompt in enumerate(prompts)], device=w.device)
        return w.head(self._norm(x[last]))

    def step(self, cache: Cache, token_B: Tensor, position_B: Tensor) -> Tensor:
        """The logits [B, V] after `token_B` at `position_B`; its keys and values enter the cache at the current
        step."""
        w = self._weights
        x = F.embedding(token_B, w.embedding)
        cos, sin = self._cos[position_B], self._sin[position_B]
        for index, layer in enumerate(w.layers):
            qkv = self._project(layer, x, cos, sin)
            out = cache.attend(index, qkv[:, : w.heads], qkv[:, w.heads :])
            x = layer.out.add(out, x)
            x = self._feed_forward(layer, x)
        return w.head(self._norm(x))


class _Decode:
    """One batch of rows from prompt to end. Row numbers are those of the batch at its start; `_rows_B` maps a place
    in the shrinking batch to them."""

    def __init__(
        self,
        engine: LocalEngine,
        prompts: Sequence[TokenIds],
        spans: Sequence[Span],
        sampling: Sampling,
        seed: int,
        n: int,
    ) -> None:
        self._engine, self._spans, self._sampling = engine, spans, sampling
        self._prompts = [prompts[span.prompt] for span in spans]
        device = engine._weights.device
        counts = torch.tensor([span.count for span in spans], device=device)
        self._group = torch.arange(len(spans), device=device).repeat_interleave(counts)
        self._lengths_U = torch.tensor([len(prompt) for prompt in self._prompts], device=device)
        self._uniforms = Uniforms(seed, [span.prompt for span in spans], n)
        starts = [i * n + span.first for i, span in enumerate(spans)]
        ranges = [torch.arange(s, s + span.count) for s, span in zip(starts, spans, strict=True)]
        self._uniform_rows = torch.cat(ranges).to(device)
        rows, steps = len(self._group), sampling.max_tokens
        self._tokens = torch.zeros(rows, steps, dtype=torch.int64, device=device)
        self._logps = torch.zeros(rows, steps, device=device)
        self._count = torch.full((rows,), steps, device=device)  # tokens of each response
        self._stopped = torch.zeros(rows, dtype=torch.bool, device=device)
        self._stop_ids = torch.tensor(sampling.stop_ids, dtype=torch.int64, device=device)
        self._ends_text = sampling.ends_text
        last = () if self._ends_text is None else self._ends_text.last_ids
        self._last_ids = torch.tensor(last, dtype=torch.int64, device=device)
        self._rows_B = torch.arange(rows, device=device)

    def run(self) -> list[tuple[int, list[Rollout]]]:
        """The rollouts of each span, as (prompt index, rollouts)."""
        prompt_cache, logits = self._engine.prefill(self._prompts)
        logits = logits[self._group]
        slots = self._sampling.max_tokens - 1
        heads = self._engine._weights.heads
        cache = make_cache(prompt_cache, self._lengths_U, self._group, heads, slots) if slots else None
        for t in range(self._sampling.max_tokens):
            token_B = self._draw(logits, t)
            if t == slots or (self.stop_possible and bool(self._stopped.all())):
                break
            token_B = self._shrink(cache, token_B)
            cache.begin(t)
            position_B = self._lengths_U[self._group[self._rows_B]] + t
            logits = self._engine.step(cache, token_B, position_B)
        return self._collect()

    @property
    def stop_possible(self) -> bool:
        """Whether a response can end before its maximum length."""
        return len(self._stop_ids) > 0 or self._ends_text is not None

    def _draw(self, logits_BV: Tensor, t: int) -> Tensor:
        rows_B = self._rows_B
        greedy = self._sampling.temperature == 0
        uniform_B = None if greedy else self._uniforms.column(t, self._uniform_rows[rows_B])
        token_B, logp_B = sample(logits_BV, self._sampling, uniform_B)
        self._tokens[rows_B, t] = token_B
        self._logps[rows_B, t] = logp_B
        if self.stop_possible:
            ended_B = torch.isin(token_B, self._stop_ids)
            if self._ends_text is not None:
                ended_B |= self._text_ended(token_B, t)
            ended = rows_B[ended_B & ~self._stopped[rows_B]]
            self._count[ended] = t + 1
            self._stopped[ended] = True
        return token_B

    def _text_ended(self, token_B: Tensor, t: int) -> Tensor:
        """Which responses a text ends at this step, bool [B]."""
        assert self._ends_text is not None
        ended_B = torch.isin(token_B, self._last_ids) & ~self._stopped[self._rows_B]
        for place in ended_B.nonzero()[:, 0].tolist():
            ended_B[place] = self._ends_text(self._tokens[self._rows_B[place], : t + 1].tolist())
        return ended_B

    def _shrink(self, cache: Cache, token_B: Tensor) -> Tensor:
        """Let finished rows leave: live rows from the end of the batch move into their places."""
        if not (self.stop_possible and self._engine._compact):
            return token_B
        done_B = self._stopped[self._rows_B]
        live = len(done_B) - int(done_B.sum())
        target = live if live <= ROW_MULTIPLE else -(-live // ROW_MULTIPLE) * ROW_MULTIPLE
        if target >= len(done_B):
            return token_B
        source = target + (~done_B[target:]).nonzero()[:, 0]
        destination = done_B[:target].nonzero()[: len(source), 0]
        cache.keep(target, destination, source)
        for per_place in (token_B, self._rows_B):
            per_place[destination] = per_place[source]
        self._rows_B = self._rows_B[:target]
        return token_B[:target]

    def _collect(self) -> list[tuple[int, list[Rollout]]]:
        rollouts = make_rollouts(
            self._tokens, self._logps, self._count.tolist(), self._stopped.tolist(), self._engine.version, self._spans
        )
        result, first = [], 0
        for span in self._spans:
            result.append((span.prompt, rollouts[first : first + span.count]))
            first += span.count
        return result
