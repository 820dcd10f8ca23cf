"""Memory of `mifo rejuvenate` on a model of 8B: measured with few of its layers and extrapolated, or with all of them.

Writes two random bf16 models with the shapes of Llama-3.1-8B (width 4096, 14336 in the MLP, 32 and 8 heads, vocabulary 128,256)
but only `--layers` of its 32, rejuvenates one towards the other in a process of its own, and takes the most that process held
resident in each part: entropies of a model, calibration (the only part with a graph), writing. What a part holds beside the
weights is a + b·layers, so two numbers of layers give what 32 need; the weights of 32 layers are counted. With `--layers 32`
nothing is extrapolated. Calibrates on one pair of `--tokens` tokens; pairs come one after another, and a target's backward
pass frees what it needed, so more of either takes time and no memory. Pages of the model's files that the system took back are
not in the peak. The folders are removed.

    python benchmarks/rejuvenate_memory.py                             # about 20 GB of disk and 8 GB of memory
    python benchmarks/rejuvenate_memory.py --layers 32 --tokens 512 --name rejuvenate_memory_whole    # 50 GB and 20 GB
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _common import publish

import torch  # isort: skip  # after _common, which sets the environment that torch reads
from transformers import AutoModelForCausalLM, LlamaConfig

from mifo.data.chartok import char_tokenizer
from mifo.train.device import pick_device

LAYERS_OF_8B = 32
BUDGET_BYTES = 48e9
GIB = 1 << 30
BLOCK_ROWS = 2048


def config_of(layers: int, scale: int) -> LlamaConfig:
    """Llama-3.1-8B with fewer layers; `scale` divides its widths (1 but in tests)."""
    return LlamaConfig(
        vocab_size=128_256 // scale,
        hidden_size=4096 // scale,
        intermediate_size=14_336 // scale,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=char_tokenizer().eos_token_id,
        dtype="bfloat16",
    )


def write_random(folder: Path, config: LlamaConfig, seed: int) -> None:
    """A folder with random weights, written some rows at a time."""
    folder.mkdir()
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, shape in shapes.items():
        end = start + 2 * shape.numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for rows in random_rows(shapes, seed):
            file.write(memoryview(rows.reshape(-1).view(torch.uint8).numpy()))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    char_tokenizer().save_pretrained(folder)


def random_rows(shapes: dict[str, torch.Size], seed: int) -> Iterator[torch.Tensor]:
    """The weights of every tensor in turn: norms near one, the others of a usual size; those of two seeds are close."""
    for index, shape in enumerate(shapes.values()):
        for start in range(0, shape[0], BLOCK_ROWS):
            size = (min(BLOCK_ROWS, shape[0] - start), *shape[1:])
            shared, own = (torch.Generator().manual_seed(1000 * index + start + s) for s in (0, 7 * (seed + 1)))
            drawn = torch.empty(size).normal_(generator=shared) + 0.3 * torch.empty(size).normal_(generator=own)
            yield (drawn * 0.02 + (1.0 if len(shape) == 1 else 0.0)).bfloat16()


def write_pair(path: Path, tokens: int) -> None:
    """One problem whose prompt and demonstration have just under so many characters, which are tokens here."""
    words = "the answer is 7. "
    text = words * (tokens // len(words) - 4)
    path.write_text(json.dumps({"problem": "7?", "answer": "7", "demonstration": text}) + "\n", encoding="utf-8")


def peak_bytes(*, reset: bool = False) -> int:
    """The most this process held resident since the last reset (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return peak


def child(arguments: argparse.Namespace) -> None:
    """Rejuvenate in this process and print the peak of each part."""
    from mifo.lab import rejuvenate as lab
    from mifo.lab.samples import PairSettings

    torch.set_num_threads(1)
    peaks: dict[str, int] = {}
    seconds: dict[str, float] = {}

    def watch(name: str, label: str) -> None:
        inner = getattr(lab, name)

        def watched(*args: Any, **keywords: Any) -> Any:
            peak_bytes(reset=True)
            begun = time.perf_counter()
            result = inner(*args, **keywords)
            peaks[label] = max(peaks.get(label, 0), peak_bytes(reset=True))
            seconds[label] = seconds.get(label, 0.0) + time.perf_counter() - begun
            return result

        setattr(lab, name, watched)

    watch("_entropies", "entropies")
    watch("_calibrate", "calibration")
    watch("_write", "writing")
    folder = Path(arguments.child)
    at_rest = peak_bytes()
    settings = lab.RejuvenationSettings(
        targets=arguments.targets,
        pairs=PairSettings(data=str(folder / "pairs.jsonl"), count=1, max_tokens=arguments.tokens),
    )
    done = lab.rejuvenate(str(folder / "base"), str(folder / "over"), str(folder / "out"), settings)
    error = done.selection.reconstruction_error["max"]
    print(
        json.dumps(
            {
                "peaks": peaks,
                "seconds": seconds,
                "at_rest": at_rest,
                "reset_share": done.neuron_share,
                "elements": done.all_elements,
                "reconstruction_error": error,
            }
        )
    )


def measure(layers: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The record of one number of layers, from a process of its own; its folders are gone afterwards."""
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        for seed, part in enumerate(("base", "over")):
            write_random(folder / part, config_of(layers, arguments.scale), seed)
        write_pair(folder / "pairs.jsonl", arguments.tokens)
        options = ["--tokens", str(arguments.tokens), "--targets", str(arguments.targets)]
        command = [sys.executable, __file__, "--child", str(folder), *options]
        finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(finished.stdout.splitlines()[-1])


def weight_bytes(layers: int, scale: int) -> int:
    """Bytes of the weights in bf16."""
    with torch.device("meta"):
        return 2 * sum(p.numel() for p in AutoModelForCausalLM.from_config(config_of(layers, scale)).parameters())


def extrapolated(found: dict[int, dict[str, Any]], scale: int) -> dict[str, Any]:
    """Bytes of each part for all layers of the 8B model, from the fewest and the most layers measured.

    Writing holds no model; the peaks of the others less the weights grow by what a layer keeps of its activations.
    """
    few, many = min(found), max(found)
    parts: dict[str, Any] = {}
    for part in found[few]["peaks"]:
        held = {n: 0 if part == "writing" else weight_bytes(n, scale) for n in (few, many, LAYERS_OF_8B)}
        low, high = (found[n]["peaks"][part] - held[n] for n in (few, many))
        slope = max(0.0, (high - low) / (many - few)) if many > few else 0.0
        parts[part] = {
            "gib": {str(layers): round(record["peaks"][part] / GIB, 3) for layers, record in found.items()},
            "beside_weights_gib": {str(n): round(value / GIB, 3) for n, value in ((few, low), (many, high))},
            "gib_per_layer_beside_weights": round(slope / GIB, 4) if many > few else None,
            "gib_of_all_layers": round((held[LAYERS_OF_8B] + high + slope * (LAYERS_OF_8B - many)) / GIB, 2),
        }
    return parts


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--targets", type=int, default=16)
    parser.add_argument("--name", default="rejuvenate_memory", help="of the record in benchmarks/results")
    parser.add_argument("--scale", type=int, default=1, help="divide all widths, to try the script")
    parser.add_argument(
        "--folder", type=Path, help="where the models are written; default: the system's temporary folder"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="write the JSON object here instead")
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    found = {layers: measure(layers, arguments) for layers in sorted(set(arguments.layers))}
    parts = extrapolated(found, arguments.scale)
    most = max(part["gib_of_all_layers"] for part in parts.values())
    result = {
        "ratio": round(most * GIB / BUDGET_BYTES, 3),
        "workload": f"mifo rejuvenate, bf16, Llama-3.1-8B with {sorted(found)} of {LAYERS_OF_8B} layers, widths / "
        f"{arguments.scale}, one pair of at most {arguments.tokens} tokens, {arguments.targets} targets",
        "measured_layers": " and ".join(map(str, sorted(found))),
        "gib_of_all_layers": most,
        "budget_gb": BUDGET_BYTES / 1e9,
        "weights_of_all_layers_gib": round(weight_bytes(LAYERS_OF_8B, arguments.scale) / GIB, 2),
        "parts": parts,
        "at_rest_gib": {str(layers): round(record["at_rest"] / GIB, 3) for layers, record in found.items()},
        "seconds": {str(layers): record["seconds"] for layers, record in found.items()},
        "reconstruction_error": {str(layers): record["reconstruction_error"] for layers, record in found.items()},
    }
    publish(arguments.name, result, pick_device("auto"), arguments.out)


if __name__ == "__main__":
    main()
