"""Which models the local engine can run, and its copy of their weights in decode layout.

Covered: dense decoder-only models of the Llama, Mistral, Qwen2 and Qwen3 families with full attention (grouped-query
attention, projection biases, per-head q/k norms, tied and untied heads, rotary embeddings that depend on the position
alone). Not covered, hence left to transformers' `generate`: sliding windows, mixtures of experts, attention sinks,
adapters and quantised layers, rotary types that depend on the sequence length.

The layout: q, k and v in one matrix; gate and up in one matrix; the gain of each RMSNorm folded in fp32 into the
matrix that follows it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mifo.rollout.linear import Linear, packing_works

MODEL_TYPES = frozenset({"llama", "mistral", "qwen2", "qwen3"})
ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})


def why_unsupported(model: nn.Module) -> str | None:
    """The reason why the local engine cannot run `model`, or None if it can."""
    config = model.config
    if config.model_type not in MODEL_TYPES:
        return f"model type {config.model_type!r} is not one of {', '.join(sorted(MODEL_TYPES))}"
    if config.hidden_act != "silu":
        return f"activation {config.hidden_act!r} is not silu"
    if config.rope_parameters["rope_type"] not in ROPE_TYPES:
        return f"rotary embedding of type {config.rope_parameters['rope_type']!r} depends on more than the position"
    if _has_sliding_window(config):
        return "it uses sliding-window attention"
    if not hasattr(model, "lm_head") or not hasattr(model, "model"):
        return f"{type(model).__name__} is not a causal language model of the expected structure"
    for name, module in model.named_modules():
        if name.endswith("_proj") and type(module) is not nn.Linear:
            return f"{name} is a {type(module).__name__}, not a plain linear layer"
    return None


def _has_sliding_window(config: object) -> bool:
    if config.model_type == "mistral":
        return config.sliding_window is not None
    if config.model_type in ("qwen2", "qwen3"):
        return any(kind != "full_attention" for kind in config.layer_types)
    return False


class Layer:
    """The weights of one decoder layer; `head_gain` [query + key heads, head size] is the q/k norm of Qwen3."""

    __slots__ = ("down", "gate_up", "head_gain", "out", "qkv")

    def __init__(self, dtype: torch.dtype, device: torch.device, *, packed: bool) -> None:
        self.qkv, self.out, self.gate_up, self.down = (Linear(dtype, device, packed=packed) for _ in range(4))
        self.head_gain: Tensor | None = None


class Weights:
    """A copy of a model's weights in decode layout. `load` fills it, in place where the layout allows."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        config = model.config
        self.dtype, self.device = dtype, device
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self.head_dim: int = model.model.layers[0].self_attn.head_dim
        self.eps: float = model.model.norm.variance_epsilon
        packed = packing_works(device.type, dtype)
        self.layers = [Layer(dtype, device, packed=packed) for _ in model.model.layers]
        self.head = Linear(dtype, device, packed=packed)
        self.embedding = torch.empty(model.model.embed_tokens.weight.shape, dtype=dtype, device=device)

    @torch.no_grad()
    def load(self, model: nn.Module) -> None:
        """Copy the weights of `model`, which must have the structure that this object was made from."""
        for layer, source in zip(self.layers, model.model.layers, strict=True):
            attention, mlp = source.self_attn, source.mlp
            _load(layer.qkv, (attention.q_proj, attention.k_proj, attention.v_proj), source.input_layernorm.weight)
            _load(layer.out, (attention.o_proj,), None)
            _load(layer.gate_up, (mlp.gate_proj, mlp.up_proj), source.post_attention_layernorm.weight)
            _load(layer.down, (mlp.down_proj,), None)
            if model.config.model_type == "qwen3":
                layer.head_gain = self._head_gain(attention)
        self.embedding.copy_(_whole(model.model.embed_tokens.weight))
        _load(self.head, (model.lm_head,), model.model.norm.weight)

    def _head_gain(self, attention: nn.Module) -> Tensor:
        query = _whole(attention.q_norm.weight).expand(self.heads, -1)
        key = _whole(attention.k_norm.weight).expand(self.kv_heads, -1)
        return torch.cat((query, key)).to(self.device, self.dtype)


def _load(target: Linear, parts: Sequence[nn.Linear], gain: nn.Parameter | None) -> None:
    biases = [_whole(part.bias) for part in parts if part.bias is not None]
    assert len(biases) in (0, len(parts)), "fused projections have all a bias or none"
    target.load([_whole(part.weight) for part in parts], biases, None if gain is None else _whole(gain))


def _whole(tensor: Tensor) -> Tensor:
    """The unsharded tensor. Under FSDP this is a collective: every rank updates its engine at the same time."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
