"""What a rollout engine is, and which one a run gets (DESIGN 6).

`make_engine` gives the local engine where the architecture is covered and a self-check against the model passes,
otherwise the engine over transformers' `generate`. It logs which one and why.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import nn

from mifo.errors import ConfigError, ModelError
from mifo.rollout.hf import GenerateEngine
from mifo.rollout.local import LocalEngine
from mifo.rollout.modes import evaluating
from mifo.rollout.weights import why_unsupported
from mifo.types import Rollout, Sampling, TokenIds

logger = logging.getLogger(__name__)

EngineKind = Literal["auto", "local", "generate"]

# The self-check's bound on the mean |Δ log-prob|, as a share of the spread of the model's log-probs over the
# vocabulary. A wrong rotation, norm or mask moves it by 0.1 or more; rounding by about 1e-6 in fp32 and 0.01 in bf16.
CHECK_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.05}
CHECK_TOKENS = 8


class Engine(Protocol):
    """Turns prompts into rollouts. `version` is the weight version that the next rollouts are marked with."""

    version: int

    def update(self, model: nn.Module, version: int) -> None:
        """Take the weights of `model` and set `version`."""

    def generate(self, prompts: Sequence[TokenIds], n: int, sampling: Sampling, seed: int) -> list[tuple[Rollout, ...]]:
        """`n` rollouts per prompt, in prompt order. The same seed and weights give the same rollouts.

        Raises:
            ConfigError, DataError: the request cannot be served (checked before any compute).
            NumericsError: the model's logits are not finite.
        """


def make_engine(
    model: nn.Module,
    *,
    kind: EngineKind = "auto",
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    max_batch_rows: int | None = None,
) -> Engine:
    """An engine that holds `model`'s weights as version 0.

    Args:
        model: a transformers causal language model. The engine "generate" keeps and uses the model itself.
        kind: "local", "generate", or "auto" to choose.
        dtype: float32, bfloat16 or float16. "generate" uses autocast where it differs from the model's.
        device: where the local engine computes. "generate" computes where the model is.
        max_batch_rows: the most responses decoded at once; None for no limit.

    Raises:
        ConfigError: an argument is out of range.
        ModelError: `kind` is "local" and the model is not covered or the self-check fails.
    """
    if kind not in ("auto", "local", "generate"):
        raise ConfigError(f"rollout engine kind = {kind!r}: use 'auto', 'local' or 'generate'")
    if dtype not in CHECK_TOLERANCE:
        raise ConfigError(f"rollout dtype = {dtype}: use float32, bfloat16 or float16")
    if max_batch_rows is not None and max_batch_rows < 1:
        raise ConfigError(f"max_batch_rows = {max_batch_rows}: use 1 or more, or None for no limit")
    if kind == "generate":
        return GenerateEngine(model, dtype=dtype, max_batch_rows=max_batch_rows)
    reason = why_unsupported(model)
    if reason is None:
        engine = LocalEngine(model, dtype=dtype, device=torch.device(device), max_batch_rows=max_batch_rows)
        gap = self_check(engine, model)
        if gap <= CHECK_TOLERANCE[dtype]:
            logger.info("rollout engine: local (%s on %s, self-check gap %.2g)", dtype, device, gap)
            return engine
        reason = (
            f"its log-probs differ from the model's by {gap:.2g} of their spread (allowed {CHECK_TOLERANCE[dtype]:g})"
        )
    if kind == "local":
        raise ModelError(f"the local rollout engine cannot run this model: {reason}; use the engine 'generate'")
    logger.warning("rollout engine: generate, because %s", reason)
    return GenerateEngine(model, dtype=dtype, max_batch_rows=max_batch_rows)


@torch.no_grad()
def self_check(engine: Engine, model: nn.Module) -> float:
    """Mean |log-prob of `engine` - log-prob of a full forward pass of `model`| over a few sampled tokens of two
    prompts of unequal length, divided by the standard deviation of the model's log-probs over the vocabulary."""
    V, context = model.config.vocab_size, model.config.max_position_embeddings
    prompts = [tuple((7 * i + 3) % V for i in range(length)) for length in (min(9, context - 1), min(5, context - 1))]
    sampling = Sampling(max_tokens=min(CHECK_TOKENS, context - max(map(len, prompts))))
    groups = engine.generate(prompts, 2, sampling, seed=0)
    gaps, spreads = [], []
    with evaluating(model):
        for prompt, group in zip(prompts, groups, strict=True):
            for rollout in group:
                ids = torch.tensor([prompt + rollout.token_ids], device=next(model.parameters()).device)
                logp = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
                own = torch.tensor(rollout.logprobs, device=logp.device)
                chosen = logp.gather(1, ids[0, len(prompt) :, None])[:, 0]
                gaps.append((own - chosen).abs())
                spreads.append(logp.std(-1))
    return float(torch.cat(gaps).mean() / torch.cat(spreads).mean().clamp(min=1e-6))
