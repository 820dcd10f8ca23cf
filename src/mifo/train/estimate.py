"""What a run will need: memory by its components, time from its tokens and a measured matrix product.

Estimates, printed by --dry-run. Memory counts what MIFO keeps per trainable element (DESIGN 5), or a second model of the same
size (critic, process reward model), plus the activations of one micro-batch; time is FLOPs by the 2ND/6ND rule over the
machine's measured rate and a utilisation that was read off runs on a 2-core Xeon (generation reaches a smaller share of the
peak than training).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from mifo.config.schema import Config
from mifo.methods import Method
from mifo.train.adapters import adapter_elements
from mifo.train.corpus import Corpus
from mifo.train.device import pick_device, pick_dtype
from mifo.train.model import TINY, read_model_config, tiny_model

TRAIN_UTILISATION, DECODE_UTILISATION = 0.35, 0.15
SCORER_PASSES = {None: 0, "critic": 2 + 6, "prm": 2 + 2 + 6}  # to score, by itself and its reference, and to learn
GIB = 1 << 30
PROCESS_BYTES, WORKER_BYTES = 420 << 20, 70 << 20  # resident, as measured on Linux with torch 2.13 for the CPU


@dataclass(frozen=True, slots=True)
class Estimate:
    """Parameters, bytes by component, FLOPs (2ND/6ND) a step, and seconds a step and in all (before evaluation)."""

    model: torch.nn.Module
    """The architecture; shapes without weights."""
    parameters: int
    memory: dict[str, int]
    flops_per_step: float
    seconds_per_step: float
    seconds: float

    @property
    def total_bytes(self) -> int:
        """Sum over components."""
        return sum(self.memory.values())


def estimate(config: Config, methods: Sequence[Method], corpus: Corpus) -> Estimate:
    """Memory and time of a run; loads no weights. With stages: the most of each component, the mean time of a step."""
    parts = [_of_stage(stage, method, corpus) for stage, method in zip(config.by_stage, methods, strict=True)]
    seconds = sum(part.seconds for part in parts)
    base = 4 * parts[0].parameters if config.rejuvenations else 0
    memory = {name: max(part.memory[name] for part in parts) for name in parts[0].memory}
    return Estimate(
        parameters=parts[0].parameters,
        model=parts[0].model,
        memory=memory | {"base of a rejuvenation, while it lasts": base},
        flops_per_step=sum(p.flops_per_step * s.train.steps for p, s in zip(parts, config.by_stage, strict=True))
        / config.steps,
        seconds_per_step=seconds / config.steps,
        seconds=seconds,
    )


def _of_stage(config: Config, method: Method, corpus: Corpus) -> Estimate:
    shape = empty_model(config)
    parameters = sum(p.numel() for p in shape.parameters())
    device = pick_device(config.model.device)
    dtype = pick_dtype(config.model.compute, device)
    rate = _measured_flops(device, dtype)
    phase = method.next_phase()
    prompt = sum(len(e.prompt_ids) for e in corpus.encoded.values()) / len(corpus.encoded)
    response = min(config.rollout.max_response_tokens, _mean_response(corpus) or config.rollout.max_response_tokens)
    sequences = phase.prompts * max(1, phase.rollouts)
    generated = phase.prompts * phase.rollouts * response
    # Dynamic sampling is taken to need one round: how many it will need is not known.
    groups = phase.prompts if phase.resample is None else phase.resample.groups
    trained = groups * (max(1, phase.rollouts) * response + prompt)
    per_token = 6 * parameters if phase.adapters is None else 4 * parameters + 6 * _adapter_elements(method, shape)
    per_token += SCORER_PASSES[method.scorer if phase.scorer_learns is not None else None] * parameters
    generating, learning = 2 * parameters * generated, per_token * trained
    step = generating / (rate * DECODE_UTILISATION) + learning / (rate * TRAIN_UTILISATION)
    return Estimate(
        parameters=parameters,
        model=shape,
        memory=_memory(config, method, shape, parameters, dtype, sequences, prompt),
        flops_per_step=float(generating + learning),
        seconds_per_step=step,
        seconds=step * config.train.steps,
    )


def empty_model(config: Config) -> PreTrainedModel:
    """The architecture on the meta device: shapes without weights."""
    if config.model.path == TINY:
        return tiny_model()
    model_config = read_model_config(config.model)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_config, trust_remote_code=config.model.trust_remote_code)


def _mean_response(corpus: Corpus) -> float | None:
    lengths = [len(e.demonstration_ids) for e in corpus.encoded.values() if e.demonstration_ids]
    return sum(lengths) / len(lengths) if lengths else None


def _memory(
    config: Config,
    method: Method,
    shape: PreTrainedModel,
    parameters: int,
    dtype: torch.dtype,
    sequences: int,
    prompt: float,
) -> dict[str, int]:
    size = shape.config
    width = torch.finfo(dtype).bits // 8
    tokens = min(config.train.micro_batch_tokens, int(sequences * (prompt + config.rollout.max_response_tokens)))
    per_layer = 16 * size.hidden_size + 3 * (
        size.intermediate_size if hasattr(size, "intermediate_size") else 4 * size.hidden_size
    )
    layers = 2 if config.model.activation_checkpointing else size.num_hidden_layers
    key_heads = size.num_key_value_heads if hasattr(size, "num_key_value_heads") else size.num_attention_heads
    kv = 2 * size.num_hidden_layers * key_heads * (size.hidden_size // size.num_attention_heads)
    rows = min(config.rollout.batch_rows or sequences, sequences)
    adapters = _adapter_elements(method, shape)
    return {
        "Python and its libraries": PROCESS_BYTES,
        "grading workers": WORKER_BYTES * config.reward.workers,
        "weights and gradients (fp32)": 8 * parameters,
        "optimizer moments": 4 * _moments(method) * parameters,
        "importance map and snapshot": 8 * parameters if method.freeze is not None else 0,
        "moments kept during SFT": 8 * parameters if method.freeze is not None and not adapters else 0,
        "adapters, gradients, moments": 16 * adapters,
        "copy for the checkpoint writer": _checkpoint_copy(config, method, parameters) + 12 * adapters,
        "reference model": 4 * parameters if method.needs_reference else 0,
        "critic or reward model, gradients, moments": 16 * parameters if method.scorer is not None else 0,
        "sampler's weights": width * parameters,
        "sampler's cache": int(rows * kv * width * (prompt + config.rollout.max_response_tokens)),
        "activations of a micro-batch": tokens * per_layer * layers * width,
    }


def _checkpoint_copy(config: Config, method: Method, parameters: int) -> int:
    """Weights, moments, importance map, snapshot and second model once more, while a checkpoint is written."""
    if not config.run.background_checkpoints:
        return 0
    copies = 1 + _moments(method) + (2 if method.freeze is not None else 0)
    return 4 * parameters * (copies + (3 if method.scorer is not None else 0))


def _moments(method: Method) -> int:
    """Moments kept for every weight: none by the optimizer of adapters."""
    return 2 * len([name for name in method.optimizers if method.adapters is None or name != "sft"])


def _adapter_elements(method: Method, shape: PreTrainedModel) -> int:
    return 0 if method.adapters is None else adapter_elements(shape.get_decoder(), method.adapters.rank)


def _measured_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product, best of three."""
    side = 4096 if device.type == "cuda" else 1024
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        start = time.perf_counter()
        product = matrix @ matrix
        float(product[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - start)
    return 2 * side**3 / best
