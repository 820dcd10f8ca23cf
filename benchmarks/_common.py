"""What the benchmarks share: environment, timer, prompts, and the record of machine and versions.

Import this before torch: the OpenMP runtime reads its environment once. `OMP_NUM_THREADS` is 1 unless it is set, because
CPU-seconds of one thread are what a busy neighbour disturbs least.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # idle OpenMP threads sleep soon instead of spinning against neighbours
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does; peers inherit it

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from mifo.train.device import pick_device, set_up_cpu

DEFAULT_MODEL = "smollm2-135m-instruct"
RESULTS = Path(__file__).parent / "results"
SYSTEM_PROMPT = "Answer with a number."

# The settings of `mifo.train.device.set_up_cpu` as environment variables of glibc, for peers in processes of their own.
MALLOC_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 30),
    "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1),
    "MALLOC_TOP_PAD_": str(64 << 20),
}


@dataclass(frozen=True, slots=True)
class Seconds:
    """One timed call: CPU seconds of all threads of this process, and wall seconds."""

    cpu: float
    wall: float


def set_up() -> torch.device:
    """Threads and malloc as in a training run; the CUDA device if there is one."""
    set_up_cpu(int(os.environ["OMP_NUM_THREADS"]))
    return pick_device("auto")


def synchronise(device: torch.device) -> None:
    """Wait for the kernels of a CUDA device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], Any], device: torch.device) -> tuple[Seconds, Any]:
    """Run `work` and wait for the device: (seconds, what it returned)."""
    synchronise(device)
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    synchronise(device)
    return Seconds(time.process_time() - cpu, time.perf_counter() - wall), result


def median_seconds(runs: Sequence[Seconds]) -> Seconds:
    """Medians of CPU and wall seconds, each on its own."""
    return Seconds(statistics.median(run.cpu for run in runs), statistics.median(run.wall for run in runs))


def plain(runs: Sequence[Seconds]) -> dict[str, list[float]]:
    """Repeats as rounded columns for the record."""
    return {
        "cpu_seconds": [round(run.cpu, 3) for run in runs],
        "wall_seconds": [round(run.wall, 3) for run in runs],
    }


def questions(count: int) -> list[str]:
    """Arithmetic questions, about 36 tokens each in the chat template of SmolLM2."""
    return [f"Tom has {7 * i + 3} apples and buys {5 * i + 11} more. How many apples?" for i in range(count)]


def chat_prompts(tokenizer: Any, count: int) -> list[tuple[int, ...]]:
    """Token ids of `questions` in the model's chat template, ready to be answered."""
    prompts = []
    for question in questions(count):
        turns = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        prompts.append(tuple(tokenizer(text, add_special_tokens=False)["input_ids"]))
    return prompts


def resolve_model(name: str) -> str:
    """A folder as it is; a model's name as the folder it is unpacked in."""
    if Path(name).is_dir():
        return name
    from mifo.train.model import resolve_model_path

    return str(resolve_model_path(name))


def model_label(name: str) -> str:
    """What the record calls the model: its name, or the last part of its folder."""
    return Path(name).resolve().name if Path(name).is_dir() else name


def machine(device: torch.device) -> dict[str, Any]:
    """Where this was measured, and how busy it was."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cpu": names[0] if names else platform.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def versions() -> dict[str, str]:
    """Versions of what was measured."""
    return {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}


def publish(name: str, result: dict[str, Any], device: torch.device, out: Path | None = None) -> None:
    """Add machine and versions, write `results/<name>.json` (or `out`), print the object as the last line."""
    assert "ratio" in result
    record = {**result, "machine": machine(device), "versions": {**versions(), **result.get("versions", {})}}
    path = out or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record))
