"""The engine over transformers' `generate`: any causal language model, with this project's sampler.

`generate` keeps the caches, masks and positions of the architecture; a logits processor draws each token with
`sampler.sample` and leaves it as the only choice, so tokens and log-probs are exact and cheap as in the local engine.
The engine uses the model it was given: changes of its weights take effect at once, and `update` only takes a model
and its version.

Not covered: encoder-decoder models. About a third of the local engine's speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from mifo.rollout.modes import evaluating
from mifo.rollout.request import Limits, Span, check_request, plan_batches
from mifo.rollout.results import make_rollouts
from mifo.rollout.sampler import Uniforms, sample
from mifo.types import Rollout, Sampling, TokenIds


class GenerateEngine:
    """Rollouts by `model.generate`; see the module."""

    def __init__(self, model: nn.Module, *, dtype: torch.dtype, max_batch_rows: int | None = None) -> None:
        """`dtype` differing from the model's parameters asks for autocast; `max_batch_rows` as in `LocalEngine`."""
        self._dtype, self._max_batch_rows = dtype, max_batch_rows
        self.update(model, version=0)

    def update(self, model: nn.Module, version: int) -> None:
        """Use `model` (the object, not a copy) and mark rollouts with `version`."""
        self._model = model
        self.version = version

    @torch.no_grad()
    def generate(self, prompts: Sequence[TokenIds], n: int, sampling: Sampling, seed: int) -> list[tuple[Rollout, ...]]:
        """As `LocalEngine.generate`; the same random numbers, so in fp32 the same rollouts."""
        check_request(prompts, n, sampling, _limits(self._model))
        found: dict[int, list[Rollout]] = {index: [] for index in range(len(prompts))}
        with evaluating(self._model), _bare_generation_config(self._model), self._autocast():
            for spans in plan_batches(prompts, n, self._max_batch_rows):
                rollouts = self._generate_batch(prompts, spans, n, sampling, seed)
                owners = [span.prompt for span in spans for _ in range(span.count)]
                for owner, rollout in zip(owners, rollouts, strict=True):
                    found[owner].append(rollout)
        return [tuple(found[index]) for index in range(len(prompts))]

    def _autocast(self) -> AbstractContextManager[None]:
        parameter = next(self._model.parameters())
        if parameter.dtype == self._dtype or self._dtype == torch.float32:
            return nullcontext()
        return torch.autocast(parameter.device.type, dtype=self._dtype)

    def _generate_batch(
        self, prompts: Sequence[TokenIds], spans: Sequence[Span], n: int, sampling: Sampling, seed: int
    ) -> list[Rollout]:
        device = next(self._model.parameters()).device
        rows = [prompts[span.prompt] for span in spans for _ in range(span.count)]
        P = max(map(len, rows))  # padded on the left, as `generate` expects
        ids = torch.tensor([[*([0] * (P - len(row))), *row] for row in rows], device=device)
        mask = torch.tensor([[0] * (P - len(row)) + [1] * len(row) for row in rows], device=device)
        uniform_rows = [i * n + span.first + j for i, span in enumerate(spans) for j in range(span.count)]
        uniforms = Uniforms(seed, [span.prompt for span in spans], n)
        drawer = _Drawer(sampling, uniforms, torch.tensor(uniform_rows, device=device))
        self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=GenerationConfig(
                max_new_tokens=sampling.max_tokens,
                do_sample=False,
                use_cache=True,
                eos_token_id=list(sampling.stop_ids) or None,
                pad_token_id=0,
            ),
            logits_processor=LogitsProcessorList([drawer]),
            stopping_criteria=None if sampling.ends_text is None else StoppingCriteriaList([_Ended(drawer)]),
        )
        return drawer.rollouts(self.version, spans)


def _limits(model: nn.Module) -> Limits:
    config = model.config.get_text_config()
    # recurrent models and those with relative positions state no maximum
    context = config.max_position_embeddings if hasattr(config, "max_position_embeddings") else None
    return Limits(context=context, vocab_size=config.vocab_size)


class _Drawer(LogitsProcessor):
    """Draws a token per row at each step and leaves it as the only one with a finite score."""

    def __init__(self, sampling: Sampling, uniforms: Uniforms, uniform_rows: Tensor) -> None:
        self._sampling, self._uniforms, self._uniform_rows = sampling, uniforms, uniform_rows
        self._stop_ids = frozenset(sampling.stop_ids)
        self._last_ids = frozenset(() if sampling.ends_text is None else sampling.ends_text.last_ids)
        self._tokens: list[Tensor] = []
        self._logps: list[Tensor] = []
        self._lengths: list[int | None] = [None] * len(uniform_rows)  # of the responses that have ended

    @property
    def ended(self) -> list[bool]:
        """Which responses have ended, at a token or with a text."""
        return [length is not None for length in self._lengths]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        greedy = self._sampling.temperature == 0
        uniform_B = None if greedy else self._uniforms.column(len(self._tokens), self._uniform_rows)
        token_B, logp_B = sample(scores, self._sampling, uniform_B)
        self._tokens.append(token_B)
        self._logps.append(logp_B)
        self._note_ended(token_B.tolist())
        return torch.full_like(scores, float("-inf")).scatter_(1, token_B[:, None], 0.0)

    def _note_ended(self, drawn: Sequence[int]) -> None:
        ends_text = self._sampling.ends_text
        for row, token in enumerate(drawn):
            if self._lengths[row] is not None:
                continue
            by_text = ends_text is not None and token in self._last_ids and ends_text(self._own(row))
            if token in self._stop_ids or by_text:
                self._lengths[row] = len(self._tokens)

    def _own(self, row: int) -> list[int]:
        return [int(token_B[row]) for token_B in self._tokens]

    def rollouts(self, version: int, spans: Sequence[Span]) -> list[Rollout]:
        tokens, logps = torch.stack(self._tokens, 1), torch.stack(self._logps, 1)
        counts = [tokens.shape[1] if length is None else length for length in self._lengths]
        return make_rollouts(tokens, logps, counts, self.ended, version, spans)


class _Ended(StoppingCriteria):
    """Tells `generate` which responses have ended: of texts it would know nothing."""

    def __init__(self, drawer: _Drawer) -> None:
        self._drawer = drawer

    def __call__(self, input_ids: Tensor, scores: Tensor, **others: object) -> Tensor:
        return torch.tensor(self._drawer.ended, device=input_ids.device)


@contextmanager
def _bare_generation_config(model: nn.Module) -> Iterator[None]:
    """`generate` fills what a request leaves open from the model's own generation config, whose penalties and
    truncations (of the hub) would silently change the distribution: it is put aside meanwhile."""
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
