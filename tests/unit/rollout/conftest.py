"""Tiny random models with logits spread wide enough that a wrong mask, rotation or norm shows."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}


def build(kind="llama", *, vocab=97, tied=True, seed=0, **extra):
    shape = {
        "vocab_size": vocab,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.25,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if kind == "mistral":
        shape["sliding_window"] = None
    if kind == "qwen3":
        shape["head_dim"] = 16
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind](**{**shape, **extra})).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norm gains are ones and biases zeros at birth: a dropped one would not show
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def make_model():
    return build


@pytest.fixture
def ragged_prompts():
    return [(5, 6, 7, 8, 9, 10, 11), (3,), (12, 4, 90), (40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50)]
