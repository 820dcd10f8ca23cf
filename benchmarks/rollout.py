"""Rollout speed: the local engine against transformers' `generate`, side by side in one run.

64 responses of 64 tokens (8 prompts × 8) at temperature 1, with no stop ids, so that both do the same work. Repeats
alternate between the two. On CPU the measure is CPU-seconds on one thread, which a busy neighbour disturbs least;
wall time is recorded beside it. `generate` runs as its users would run it: bfloat16 weights, dynamic cache,
`num_return_sequences`, no top-k. The last line of the output is one JSON object; `--out FILE` also writes it to a file.

    python benchmarks/rollout.py --model PATH --out benchmarks/results/rollout.json
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: one thread, comparable CPU-seconds

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from mifo.rollout.engine import make_engine
from mifo.rollout.local import LocalEngine
from mifo.types import Sampling, TokenIds

PROMPTS, ROLLOUTS, NEW_TOKENS = 8, 8, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """Seconds of each repeat and tokens per second at the median; `cpu` counts all threads of the process."""

    cpu_seconds: tuple[float, ...]
    wall_seconds: tuple[float, ...]
    tokens: int
    tokens_per_cpu_second: float
    tokens_per_wall_second: float


def measure(work: Callable[[], int], device: torch.device) -> tuple[float, float, int]:
    """CPU seconds, wall seconds and tokens of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    tokens = work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.process_time() - cpu, time.perf_counter() - wall, tokens


def summarise(runs: list[tuple[float, float, int]]) -> Timing:
    cpu, wall, tokens = (tuple(column) for column in zip(*runs, strict=True))
    return Timing(
        cpu_seconds=tuple(round(seconds, 3) for seconds in cpu),
        wall_seconds=tuple(round(seconds, 3) for seconds in wall),
        tokens=tokens[0],
        tokens_per_cpu_second=round(tokens[0] / statistics.median(cpu), 1),
        tokens_per_wall_second=round(tokens[0] / statistics.median(wall), 1),
    )


def build_prompts(tokenizer: object) -> list[TokenIds]:
    """Eight arithmetic questions in the model's chat template, about 36 tokens each."""
    prompts = []
    for i in range(PROMPTS):
        question = f"Tom has {7 * i + 3} apples and buys {5 * i + 11} more. How many apples?"
        turns = [{"role": "system", "content": "Answer with a number."}, {"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        prompts.append(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))
    return prompts


def generate_with_transformers(model: object, prompts: list[TokenIds], device: torch.device) -> Callable[[], int]:
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


def machine(device: torch.device) -> dict[str, object]:
    model_name = ""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model_name = names[0] if names else ""
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "cpu": model_name or platform.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "note": "other processes shared the machine; compare CPU-seconds",
    }


def resolve_model(name: str) -> str:
    if Path(name).exists():
        return name
    from mifo.train.model import resolve_model_path

    return str(resolve_model_path(name))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="model folder or name")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    arguments = parser.parse_args()

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, arguments.dtype)
    path = resolve_model(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(device).eval()
    prompts = build_prompts(AutoTokenizer.from_pretrained(path))
    engine = make_engine(model, kind="local", dtype=dtype, device=device, max_batch_rows=None)
    assert isinstance(engine, LocalEngine)
    syncs = [measure(lambda: engine.update(model, version=1) or 0, device) for _ in range(4)][1:]
    peer = generate_with_transformers(model.to(dtype), prompts, device)
    sampling = Sampling(max_tokens=NEW_TOKENS)

    def own(seed: int) -> int:
        groups = engine.generate(prompts, ROLLOUTS, sampling, seed)
        return sum(len(rollout.token_ids) for group in groups for rollout in group)

    own(0), peer()  # warm-up: kernels are compiled at first use
    runs: dict[str, list[tuple[float, float, int]]] = {"engine": [], "generate": []}
    for repeat in range(arguments.repeats):
        runs["engine"].append(measure(lambda seed=repeat: own(seed), device))
        runs["generate"].append(measure(peer, device))
    timings = {name: summarise(found) for name, found in runs.items()}
    assert timings["engine"].tokens == timings["generate"].tokens == PROMPTS * ROLLOUTS * NEW_TOKENS
    cpu, wall = (
        round(getattr(timings["engine"], key) / getattr(timings["generate"], key), 2)
        for key in ("tokens_per_cpu_second", "tokens_per_wall_second")
    )
    result = {
        "ratio": wall if device.type == "cuda" else cpu,
        "ratio_cpu": cpu,
        "ratio_wall": wall,
        "workload": f"{PROMPTS} prompts x {ROLLOUTS} rollouts x {NEW_TOKENS} tokens, temperature 1, {arguments.dtype}",
        "prompt_tokens": sorted({len(prompt) for prompt in prompts}),
        "model": arguments.model if not Path(arguments.model).exists() else Path(arguments.model).resolve().name,
        "engine": asdict(timings["engine"]),
        "generate": asdict(timings["generate"]),
        "weight_sync_seconds": [round(run[1], 3) for run in syncs],
        "machine": machine(device),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
