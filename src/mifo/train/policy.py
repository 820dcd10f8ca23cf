"""The policy: log-probs and entropies of the responses in a micro-batch, with gradients.

Runs the decoder body once over a packed (or padded) row, gathers the hidden states that predict a response token, and gives
only those to the chunked head of `core.logprobs`. Master weights are fp32; the forward pass runs under autocast where
bfloat16 is asked for.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mifo.core.logprobs import token_logprobs
from mifo.core.vocabulary import Rows, vocabulary_statistic
from mifo.data.pack import MicroBatch, pack
from mifo.errors import ModelError
from mifo.train.attention import NO_MASK, PACKED_ATTENTION, plan_attention
from mifo.train.faults import check_weights
from mifo.train.norm import fuse_norms
from mifo.types import Sequence, VocabularyStatistic

log = logging.getLogger(__name__)

Layout = Literal["packed", "padded"]
CHECK_TOLERANCE = 1e-3  # nats, fp32: packed against a plain forward pass; a wrong mask is off by far more


class Policy:
    """A causal language model as a function from micro-batches to token log-probs and entropies.

    Args:
        model: in fp32, on its device.
        compute_dtype: arithmetic of the forward and backward passes.
        layout: "packed", "padded", or "auto": packed if it agrees with a plain forward pass of this model.
        activation_checkpointing: recompute the body's activations in the backward pass.
    """

    quantity = "log-prob"
    """What `token_stats` gives of each token, in messages."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        compute_dtype: torch.dtype = torch.float32,
        layout: Literal["auto", "packed", "padded"] = "auto",
        activation_checkpointing: bool = False,
    ) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.compute_dtype = compute_dtype
        self.body: nn.Module = model.get_decoder()
        head = model.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise ModelError(
                f"{type(model).__name__} has no linear output layer, so its log-probs cannot be made in chunks."
            )
        self.head = head
        check_weights(model)
        fuse_norms(model)
        self._check_head()
        self.layout: Layout = self._pick_layout(layout)
        if activation_checkpointing:
            model.train()
            _checkpoint_activations(model)
        else:
            model.eval()

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Trainable parameters in the model's order, tied weights once."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @contextlib.contextmanager
    def autocast(self, dtype: torch.dtype | None = None) -> Iterator[None]:
        """The arithmetic of this policy, or another; weights are cast once for all micro-batches inside one `with`."""
        dtype = dtype or self.compute_dtype
        enabled = dtype != torch.float32 and next(self.model.parameters()).dtype == torch.float32
        with torch.autocast(self.device.type, dtype=dtype if enabled else None, enabled=enabled):
            yield

    def token_stats(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """(logp_T, entropy_T) of the response tokens, differentiable; call inside `autocast`."""
        batch = batch.to(self.device)
        rows = self._predictors(batch)
        with torch.autocast(self.device.type, enabled=False):
            return token_logprobs(rows.hidden_TD, rows.weight_VD, batch.target_T, bias_V=rows.bias_V)

    def vocabulary_stats(
        self, batch: MicroBatch, statistic: VocabularyStatistic, reference: Policy | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(logp_T, entropy_T, vocabulary_T) from one pass through the body, and one of the reference where it is needed."""
        batch = batch.to(self.device)
        rows, ref = self._predictors(batch), None
        if statistic.needs_reference:
            assert reference is not None
            with torch.no_grad():
                ref = reference._predictors(batch)
        with torch.autocast(self.device.type, enabled=False):
            logp_T, entropy_T = token_logprobs(rows.hidden_TD, rows.weight_VD, batch.target_T, bias_V=rows.bias_V)
            return logp_T, entropy_T, vocabulary_statistic(statistic, rows, batch.target_T, ref)

    def _predictors(self, batch: MicroBatch) -> Rows:
        """The hidden states that predict the response tokens, with the output layer."""
        hidden_TD = (self._packed if self.layout == "packed" else self._padded)(batch)
        if torch.is_autocast_enabled(self.device.type):
            hidden_TD = hidden_TD.to(torch.get_autocast_dtype(self.device.type))
        return Rows(hidden_TD, self.head.weight, self.head.bias)

    def _packed(self, batch: MicroBatch) -> Tensor:
        assert self.model.config._attn_implementation == PACKED_ATTENTION, (
            "somebody changed the attention of this model"
        )
        hidden = self.body(
            input_ids=batch.input_N[None],
            position_ids=batch.position_N[None],
            attention_mask=torch.ones(NO_MASK, dtype=torch.bool, device=self.device),
            attention_plan=plan_attention(batch.branches, self.device),
            use_cache=False,
        ).last_hidden_state
        return hidden[0].index_select(0, batch.predictor_T)

    def _padded(self, batch: MicroBatch) -> Tensor:
        """Every sequence in a row of its own, for architectures whose attention is not plain causal attention."""
        rows = _rows(batch)
        longest = max(len(row) for row in rows)
        index = torch.stack([torch.cat([row, row.new_zeros(longest - len(row))]) for row in rows])
        real = torch.stack([torch.arange(longest, device=self.device) < len(row) for row in rows])
        hidden = self.body(
            input_ids=batch.input_N[index],
            attention_mask=real.long(),
            position_ids=batch.position_N[index],
            use_cache=False,
        ).last_hidden_state
        counts = torch.bincount(batch.sequence_T, minlength=len(rows)).tolist()
        # A row ends with what is fed of its response, so its last |y| positions are those that predict y.
        return torch.cat(
            [hidden[i, len(row) - n : len(row)] for i, (row, n) in enumerate(zip(rows, counts, strict=True))]
        )

    @torch.no_grad()
    def _check_head(self) -> None:
        """The head must be a plain matrix product: some architectures scale or cap their logits."""
        cap = self.model.config.to_dict().get("final_logit_softcapping")
        if cap is not None:  # small logits pass the probe below; those of a trained model are bent
            raise ModelError(
                f"{type(self.model).__name__} caps its logits (final_logit_softcapping = {cap:g}), which the chunked log-probs "
                "do not reproduce. Use an architecture with a plain output layer (Llama, Qwen, Mistral)."
            )
        ids = _probe_ids(self.model)[None]
        output = self.model(input_ids=ids, use_cache=False)
        hidden = self.body(input_ids=ids, use_cache=False).last_hidden_state
        if not torch.isfinite(output.logits).all():
            raise ModelError(
                f"{type(self.model).__name__} gives logits that are not finite: some of its weights are NaN, infinite or far too "
                "large. Fetch the model again; if it was being trained, go back to an earlier checkpoint."
            )
        other = ids.clone()
        other[:, -1] = (ids[:, -1] + 1) % self.model.get_input_embeddings().num_embeddings
        # Of the same length: another shape rounds otherwise, in bfloat16 by more than any tolerance.
        changed = self.body(input_ids=other, use_cache=False).last_hidden_state
        if not torch.allclose(hidden[:, :-1], changed[:, :-1], atol=1e-3, rtol=1e-3):
            raise ModelError(
                f"{type(self.model).__name__} lets a token see those behind it, so it cannot be trained to write. Use a causal "
                "decoder (Llama, Qwen, Mistral)."
            )
        if not torch.allclose(self.head(hidden), output.logits, atol=1e-3, rtol=1e-3):
            raise ModelError(
                f"{type(self.model).__name__} changes its logits after the output layer (scaling or capping), which the "
                "chunked log-probs do not reproduce. Use an architecture with a plain output layer (Llama, Qwen, Mistral)."
            )

    def _pick_layout(self, wanted: Literal["auto", "packed", "padded"]) -> Layout:
        if wanted == "padded":
            return "padded"
        attention = self.model.config._attn_implementation
        gap = self._packing_gap()
        if gap <= CHECK_TOLERANCE:
            return "packed"
        self.model.set_attn_implementation(attention)
        if wanted == "packed":
            raise ModelError(
                f"model.layout = 'packed': {type(self.model).__name__} gives log-probs that differ by {gap:.2g} nats when "
                "sequences are packed. Its attention is not plain causal attention; use layout 'auto' or 'padded'."
            )
        log.warning("packed and plain log-probs differ by %.2g nats: micro-batches are padded instead", gap)
        return "padded"

    @torch.no_grad()
    def _packing_gap(self) -> float:
        """Largest |Δ log-prob| between packed and one-by-one on a small probe with shared and own prompts."""
        ids = _probe_ids(self.model).tolist()
        shapes = [((0, 5), (5, 9)), ((0, 5), (7, 9)), ((0, 5), (6, 12)), ((3, 6), (6, 13)), ((2, 4), (9, 10))]
        probe = [
            Sequence(problem_id="", prompt_ids=tuple(ids[a:b]), response_ids=tuple(ids[c:d]), weights={})
            for (a, b), (c, d) in shapes
        ]
        self.layout = "padded"
        plain = torch.cat([self.token_stats(pack(probe, [i]))[0] for i in range(len(probe))])
        self.layout = "packed"
        self.model.set_attn_implementation(PACKED_ATTENTION)
        try:
            packed, _ = self.token_stats(pack(probe, range(len(probe))))
        except (TypeError, ValueError, RuntimeError, AssertionError) as error:
            # A model that does not pass the plan to its attention, or whose attention needs what this one does not do.
            log.warning("packed forward pass failed: %s", error)
            return float("inf")
        return float((packed - plain).abs().max())


def _checkpoint_activations(model: PreTrainedModel) -> None:
    """Under either name: transformers renamed the switch and warns of the old name, which 5.17 alone has."""
    settings = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


def _probe_ids(model: PreTrainedModel) -> Tensor:
    vocabulary = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (16,), generator=generator).to(next(model.parameters()).device)


def _rows(batch: MicroBatch) -> list[Tensor]:
    """For each sequence, in order, the row positions of its prompt and of what is fed of its response."""
    rows = []
    for branch in batch.branches:
        prompt = torch.arange(branch.prompt_start, branch.prompt_start + branch.prompt_length)
        rows += [torch.cat([prompt, torch.arange(s, s + n)]) for s, n in branch.responses]
    return [row.to(batch.input_N.device) for row in rows]
