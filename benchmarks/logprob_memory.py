"""Memory of log-probs and entropies at a vocabulary of 151,936: the chunked head against one that keeps the logits.

Forward and backward through `mifo.core.logprobs.token_logprobs` and through the textbook version (logits, log_softmax,
gather, −Σ p log p, autograd), 2,048 tokens, hidden size 896, fp32. Each runs in a process of its own. The peak is the
maximum resident size minus what was resident once inputs and weights existed (on CUDA: allocated bytes); it contains the
gradients of both, which any version needs, so `ratio_without_gradients` is given beside the strict `ratio` (ours / full).

    python benchmarks/logprob_memory.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _common import Seconds, median_seconds, plain, publish, timed

import torch  # isort: skip  # after _common, which sets the environment that torch reads
from torch import Tensor

from mifo.core.logprobs import token_logprobs
from mifo.train.device import pick_device

Head = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
ENTROPY_WEIGHT = 0.01
MIB = 1 << 20


def full_logits(hidden_TD: Tensor, weight_VD: Tensor, target_T: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies from a [T, V] tensor of log-probs."""
    logp_TV = torch.nn.functional.linear(hidden_TD, weight_VD).float().log_softmax(-1)
    return logp_TV.gather(1, target_T[:, None])[:, 0], -(logp_TV.exp() * logp_TV).sum(-1)


HEADS: dict[str, Head] = {"ours": token_logprobs, "full": full_logits}


def resident_bytes() -> int:
    """What this process holds in memory now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def peak_resident_bytes() -> int:
    """The most that this process ever held. `ru_maxrss` would start at its parent's size, so the kernel's own mark."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def child(arguments: argparse.Namespace) -> None:
    """Measure one version and print a JSON object."""
    torch.set_num_threads(1)
    device = pick_device("auto")
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(arguments.tokens, arguments.hidden, generator=generator).to(device).requires_grad_()
    weight_VD = torch.randn(arguments.vocabulary, arguments.hidden, generator=generator).mul_(0.05).to(device)
    weight_VD.requires_grad_()
    target_T = torch.randint(0, arguments.vocabulary, (arguments.tokens,), generator=generator).to(device)
    slope_T = torch.randn(arguments.tokens, generator=generator).to(device)
    head = HEADS[arguments.child]

    def work() -> tuple[float, float]:
        hidden_TD.grad = weight_VD.grad = None
        logp_T, entropy_T = head(hidden_TD, weight_VD, target_T)
        loss = (slope_T * logp_T).sum() + ENTROPY_WEIGHT * entropy_T.sum()
        loss.backward()
        return float(loss.detach()), float(entropy_T.detach().mean())

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        baseline = torch.cuda.memory_allocated(device)
    else:
        baseline = resident_bytes()
    results = [timed(work, device) for _ in range(arguments.repeats + 1)]
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_resident_bytes()
    gradients = hidden_TD.grad.nbytes + weight_VD.grad.nbytes
    record = {
        "peak_mib": (peak - baseline) / MIB,
        "gradients_mib": gradients / MIB,
        "loss": results[-1][1][0],
        "mean_entropy": results[-1][1][1],
        "gradient_norms": [float(hidden_TD.grad.norm()), float(weight_VD.grad.norm())],
        "runs": [[seconds.cpu, seconds.wall] for seconds, _ in results[1:]],
    }
    print(json.dumps(record))


def run_child(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """The record of one version from a process of its own."""
    shape = ("tokens", "hidden", "vocabulary", "repeats")
    options = [part for key in shape for part in (f"--{key}", str(getattr(arguments, key)))]
    command = [sys.executable, __file__, "--child", name, *options]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(finished.stdout.splitlines()[-1])


def main() -> None:
    """Measure both and publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", choices=tuple(HEADS), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="write the JSON object here instead")
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments)
        return
    found = {name: run_child(name, arguments) for name in HEADS}
    publish("logprob_memory", compare(found, arguments), pick_device("auto"), arguments.out)


def compare(found: dict[str, dict[str, Any]], arguments: argparse.Namespace) -> dict[str, Any]:
    """Ratios of ours to full, and how far the two results are apart."""
    ours, full = found["ours"], found["full"]
    runs = {name: [Seconds(*pair) for pair in record["runs"]] for name, record in found.items()}
    middle = {name: median_seconds(value) for name, value in runs.items()}
    gradients = ours["gradients_mib"]
    gaps = [abs(a - b) / b for a, b in zip(ours["gradient_norms"], full["gradient_norms"], strict=True)]
    return {
        "ratio": round(ours["peak_mib"] / full["peak_mib"], 3),
        "ratio_without_gradients": round((ours["peak_mib"] - gradients) / (full["peak_mib"] - gradients), 3),
        "ratio_time": round(middle["ours"].wall / middle["full"].wall, 3),
        "ratio_cpu": round(middle["ours"].cpu / middle["full"].cpu, 3),
        "workload": f"{arguments.tokens} tokens, hidden {arguments.hidden}, vocabulary {arguments.vocabulary}, fp32, "
        "log-prob and entropy, forward and backward",
        "gradients_mib": round(gradients, 1),
        "ours": {"peak_mib": round(ours["peak_mib"], 1), **plain(runs["ours"])},
        "full": {"peak_mib": round(full["peak_mib"], 1), **plain(runs["full"])},
        "relative_difference": {
            "loss": abs(ours["loss"] - full["loss"]) / abs(full["loss"]),
            "mean_entropy": abs(ours["mean_entropy"] - full["mean_entropy"]) / full["mean_entropy"],
            "gradient_norms": max(gaps),
        },
    }


if __name__ == "__main__":
    main()
