"""What bfloat16 gains or costs on this CPU: SFT updates of the embedded model in either arithmetic, and one matrix product.

`model.compute = "auto"` means bfloat16 only on a CPU with matrix units (AMX, or Arm's), since dot products of bfloat16 alone
are no faster than those of float32. This is where that can be seen. `ratio` = float32 / bfloat16 in CPU-seconds of an
update of 16 demonstrations: under 1, bfloat16 is the slower one.

    python benchmarks/cpu_arithmetic.py
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from _common import Seconds, median_seconds, plain, publish, timed

import torch  # isort: skip  # after _common, which sets the environment that torch reads

from mifo.config.load import load_config
from mifo.eval.score import make_evaluate
from mifo.train.build import build_run, make_grader, prepare
from mifo.train.device import pick_dtype
from mifo.types import Phase

CPU = torch.device("cpu")
ARITHMETICS = ("float32", "bfloat16")
WARM_UP = 1


def updates(compute: str, repeats: int, folder: Path) -> list[Seconds]:
    """Seconds of SFT updates of the recipe sft-smollm2, warmed up."""
    flags = ["--model.compute", compute, "--model.device", "cpu", "--train.threads", str(torch.get_num_threads())]
    _, config = load_config("sft-smollm2", [*flags, "--method.batch-size", "16", "--data.evaluation", "none"])
    phase = Phase(name="sft", optimizer="sft", prompts=16, rollouts=0)
    found = []
    with make_grader(config) as grader:
        run = build_run(prepare(config, grader), grader, folder, make_evaluate=make_evaluate, listener=lambda *_: None)
        for _ in range(WARM_UP + repeats):
            groups = run.collect(phase)
            work = run.method.updates(phase, groups)
            seconds, reports = timed(lambda work=work: run.learn(phase, work), CPU)
            assert all(report.taken for report in reports)
            run.record(phase, groups, reports)
            found.append(seconds)
    return found[WARM_UP:]


def product(compute: str, repeats: int) -> list[Seconds]:
    """Seconds of 20 products of 1,024 tokens with a matrix of the embedded model's MLP."""
    dtype = pick_dtype(compute, CPU)
    left, right = torch.randn(1024, 576).to(dtype), torch.randn(1536, 576).to(dtype)

    def work() -> None:
        for _ in range(20):
            torch.nn.functional.linear(left, right)

    return [timed(work, CPU)[0] for _ in range(WARM_UP + repeats)][WARM_UP:]


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the JSON object here instead")
    arguments = parser.parse_args()

    steps, products = {}, {}
    for compute in ARITHMETICS:
        with tempfile.TemporaryDirectory() as folder:
            steps[compute] = updates(compute, arguments.repeats, Path(folder) / "run")
        products[compute] = product(compute, arguments.repeats)
    seconds = {name: median_seconds(runs).cpu for name, runs in steps.items()}
    products_20 = {name: median_seconds(runs).cpu for name, runs in products.items()}
    gigaflops = {name: round(20 * 2 * 1024 * 576 * 1536 / taken / 1e9) for name, taken in products_20.items()}
    result = {
        "ratio": round(seconds["float32"] / seconds["bfloat16"], 3),
        "update": {name: plain(runs) for name, runs in steps.items()},
        "product_gigaflops": gigaflops,
        "auto": str(pick_dtype("auto", CPU)).removeprefix("torch."),
        "capabilities": sorted(name for name, there in torch.cpu.get_capabilities().items() if there is True),
    }
    publish("cpu_arithmetic", result, CPU, arguments.out)


if __name__ == "__main__":
    main()
