"""Small models of each family, and the same after some training."""

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from mifo.data.chartok import char_tokenizer

FAMILIES = ("llama", "llama_bias", "mistral", "qwen2", "qwen2_untied", "qwen3", "qwen3_tied")


def family_model(name, seed=0):
    """Two layers, grouped heads; biases and norms are moved off their initial zeros and ones."""
    tokenizer = char_tokenizer()
    shared = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name == "llama":
            model = LlamaForCausalLM(LlamaConfig(**shared, tie_word_embeddings=False))
        elif name == "llama_bias":
            config = LlamaConfig(**shared, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)
            model = LlamaForCausalLM(config)
        elif name == "mistral":
            model = MistralForCausalLM(MistralConfig(**shared, sliding_window=None, tie_word_embeddings=False))
        elif name.startswith("qwen3"):
            model = Qwen3ForCausalLM(Qwen3Config(**shared, head_dim=16, tie_word_embeddings=name == "qwen3_tied"))
        else:
            model = Qwen2ForCausalLM(Qwen2Config(**shared, tie_word_embeddings=name == "qwen2"))
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape)
    return model.requires_grad_(False).eval()


def moved(model, seed, share=0.9, scale=0.2):
    """A copy of a model after some training: most elements moved, some did not."""
    generator = torch.Generator().manual_seed(seed)
    other = type(model)(model.config)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for parameter in other.parameters():
            change = scale * torch.randn(parameter.shape, generator=generator)
            parameter += change * (torch.rand(parameter.shape, generator=generator) < share)
    return other.requires_grad_(False).eval()


def save(model, folder, **options):
    model.save_pretrained(folder, **options)
    char_tokenizer().save_pretrained(folder)
    return str(folder)
