"""What a checkpoint costs training: written while it waits, or beside it, with memory at hand and with little of it.

All state that MIFO has on the embedded model (weights, moments of two optimizers, importance map and snapshot; 3.8 GB) is
saved by the run's own writer, in turn:

    foreground   `save` returns when the checkpoint is committed; nothing is copied
    background   `save` returns when the state is copied; a thread writes it

Recorded are the seconds that `save` holds training up (`held`) and those until the checkpoint is committed (`done`). A second
round fills the machine's memory up to `--leave` GiB, those of the copy not counted: then the copy has to wait until the system
writes out what it keeps of files. The process offers itself first to the system's out-of-memory killer. Nothing trains beside
the write, so a write that training slows down is not measured here. Linux.

    python benchmarks/checkpoint.py
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _common import publish, set_up

import torch  # isort: skip  # after _common, which sets the environment that torch reads

from mifo.config.load import load_config
from mifo.eval.score import make_evaluate
from mifo.train.build import build_run, make_grader, prepare
from mifo.train.run import Run
from mifo.train.writer import CheckpointWriter

GIB = 1 << 30


def available_bytes() -> int:
    """Memory that can be had without swapping, by the kernel's estimate."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))


def with_all_state(run: Run) -> int:
    """Give both optimizers their moments; returns the bytes of a checkpoint."""
    for optimizer in run.parts.optimizers.values():
        for parameter in run.learner.parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.optimizer.step()
        optimizer.optimizer.zero_grad()
    run.mark()
    tensors = [tensor for members in run.snapshot().tensors.values() for tensor in members.values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def saved(run: Run, number: int, *, background: bool) -> dict[str, float]:
    """Seconds of one save."""
    writer = CheckpointWriter(run.parts.checkpoints, background=background)
    started = time.perf_counter()
    writer.save(number, run.snapshot())
    held = time.perf_counter() - started
    writer.wait()
    return {"held": held, "done": time.perf_counter() - started}


def ballast(leave: int) -> torch.Tensor:
    """Memory in use, so that `leave` bytes are available; empty where there are no more than that."""
    return torch.ones(max(0, available_bytes() - leave), dtype=torch.uint8)


def rounds(run: Run, repeats: int, numbers: Callable[[], int]) -> dict[str, list[dict[str, float]]]:
    """`repeats` saves of each kind, in turn."""
    found: dict[str, list[dict[str, float]]] = {"foreground": [], "background": []}
    for _ in range(repeats):
        for kind, row in found.items():
            row.append(saved(run, numbers(), background=kind == "background"))
            print(kind, {name: round(value, 2) for name, value in row[-1].items()}, flush=True)
    return found


def measured(run: Run, repeats: int, leave_gib: float) -> dict[str, Any]:
    """All figures: with what memory there is, and with little."""
    size, count = with_all_state(run), iter(range(1, 10_000))
    result: dict[str, Any] = {"bytes": size}
    saved(run, next(count), background=True)  # the first copy makes the heap as large as it will be
    for name, leave in (("plenty", None), ("little", int(leave_gib * GIB) + size)):
        held = ballast(leave) if leave is not None else torch.empty(0)
        entry: dict[str, Any] = {
            "available_gib": round(available_bytes() / GIB, 2),
            "ballast_gib": round(len(held) / GIB, 2),
        }
        for kind, row in rounds(run, repeats, lambda: next(count)).items():
            entry[kind] = {part: [round(seconds[part], 2) for seconds in row] for part in ("held", "done")}
        result[name] = entry
        del held
    return result


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--leave", type=float, default=1.5, help="GiB beside the copy that the second round leaves (default: 1.5)"
    )
    parser.add_argument(
        "--folder", type=Path, help="where checkpoints are written (default: the system's folder for such files)"
    )
    parser.add_argument("--out", type=Path, help="write the JSON object here instead")
    arguments = parser.parse_args()

    device = set_up()
    Path("/proc/self/oom_score_adj").write_text("1000")
    flags = [
        "--data.train-problems",
        "70",
        "--run.keep-checkpoints",
        "1",
        "--train.threads",
        str(torch.get_num_threads()),
    ]
    _, config = load_config("smollm2-arithmetic", flags)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, evaluation="none"))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder, make_grader(config) as grader:
        run = build_run(
            prepare(config, grader), grader, Path(folder) / "run", make_evaluate=make_evaluate, listener=lambda *_: None
        )
        result = measured(run, arguments.repeats, arguments.leave)
        run.close()
    held = {kind: statistics.median(result["plenty"][kind]["held"]) for kind in ("foreground", "background")}
    publish("checkpoint", {"ratio": round(held["foreground"] / held["background"], 3), **result}, device, arguments.out)


if __name__ == "__main__":
    main()
