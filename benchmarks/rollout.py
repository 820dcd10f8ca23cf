"""Rollout speed: the local engine against transformers' `generate`, side by side in one run.

64 responses of 64 tokens (8 prompts × 8) at temperature 1, with no stop ids, so that both do the same work. Repeats
alternate between the two. On CPU the measure is CPU-seconds on one thread, which a busy neighbour disturbs least;
wall time is recorded beside it. `generate` runs as its users would run it: bfloat16 weights, dynamic cache,
`num_return_sequences`, no top-k. The last line of the output is one JSON object, also written to results/rollout.json.

    python benchmarks/rollout.py
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _common import (
    DEFAULT_MODEL,
    Seconds,
    chat_prompts,
    median_seconds,
    model_label,
    plain,
    publish,
    resolve_model,
    set_up,
    timed,
)

import torch  # isort: skip  # after _common, which sets the environment that torch reads
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig  # isort: skip

from mifo.rollout.engine import make_engine
from mifo.rollout.local import LocalEngine
from mifo.types import Sampling, TokenIds

PROMPTS, ROLLOUTS, NEW_TOKENS = 8, 8, 64
TOKENS = PROMPTS * ROLLOUTS * NEW_TOKENS


def generate_with_transformers(model: Any, prompts: list[TokenIds], device: torch.device) -> Callable[[], int]:
    """The peer: `generate` on a left-padded batch with one row per prompt, `num_return_sequences` rollouts each."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
    model.generation_config = GenerationConfig(pad_token_id=0)
    config = GenerationConfig(
        max_new_tokens=NEW_TOKENS,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=ROLLOUTS,
        eos_token_id=None,
        pad_token_id=0,
    )

    def work() -> int:
        out = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
        return out[:, longest:].numel()

    return work


def summary(runs: list[Seconds]) -> dict[str, Any]:
    """Repeats and tokens per second at the median."""
    middle = median_seconds(runs)
    return {
        **plain(runs),
        "tokens": TOKENS,
        "tokens_per_cpu_second": round(TOKENS / middle.cpu, 1),
        "tokens_per_wall_second": round(TOKENS / middle.wall, 1),
    }


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="model folder or name")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--out", type=Path, help="write the JSON object here instead")
    arguments = parser.parse_args()

    device = set_up()
    dtype = getattr(torch, arguments.dtype)
    path = resolve_model(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).eval()
    prompts = chat_prompts(AutoTokenizer.from_pretrained(path), PROMPTS)
    engine = make_engine(model, kind="local", dtype=dtype, device=device, max_batch_rows=None)
    assert isinstance(engine, LocalEngine)
    syncs = [timed(lambda: engine.update(model, version=1), device)[0] for _ in range(4)][1:]
    peer = generate_with_transformers(model.to(dtype), prompts, device)
    sampling = Sampling(max_tokens=NEW_TOKENS)

    def own(seed: int) -> int:
        groups = engine.generate(prompts, ROLLOUTS, sampling, seed)
        return sum(len(rollout.token_ids) for group in groups for rollout in group)

    for _ in range(2):  # warm-up: kernels are compiled and memory is touched for the first time
        assert own(0) == peer() == TOKENS
    runs: dict[str, list[Seconds]] = {"engine": [], "generate": []}
    for repeat in range(arguments.repeats):
        runs["engine"].append(timed(lambda seed=repeat: own(seed), device)[0])
        runs["generate"].append(timed(peer, device)[0])
    own_time, peer_time = median_seconds(runs["engine"]), median_seconds(runs["generate"])
    cpu, wall = round(peer_time.cpu / own_time.cpu, 2), round(peer_time.wall / own_time.wall, 2)
    result = {
        "ratio": wall if device.type == "cuda" else cpu,
        "ratio_cpu": cpu,
        "ratio_wall": wall,
        "workload": f"{PROMPTS} prompts x {ROLLOUTS} rollouts x {NEW_TOKENS} tokens, temperature 1, {arguments.dtype}",
        "prompt_tokens": sorted({len(prompt) for prompt in prompts}),
        "model": model_label(arguments.model),
        "engine": summary(runs["engine"]),
        "generate": summary(runs["generate"]),
        "weight_sync_seconds": [round(run.wall, 3) for run in syncs],
    }
    publish("rollout", result, device, arguments.out)


if __name__ == "__main__":
    main()
