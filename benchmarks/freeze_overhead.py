"""What freezing costs: importance map, exact global top-k, hard freeze and snapshot as a share of one MIFO interval.

The interval is the shortest that the recipe smollm2-arithmetic can have, in a fixed shape: 4 RL steps of 16 prompts × 8
rollouts × 64 tokens, in which every question fails, 4 SFT updates of 16 demonstrations, and the forgetting meter before and
after them; all through the recipe's own model, data, graders, engine and learner, with all-equal groups skipped and responses
ending where the model ends them. `ratio` = freeze / interval, in CPU-seconds on CPU and wall seconds on CUDA:

    freeze   = end_interval + begin_interval + (masked gradients, frozen steps, settling of 4 updates) − 4 plain steps
    interval = 4 RL steps + 4 SFT updates without a freeze + 2 meters + freeze

`ratio_without_meter` leaves the meters out of the interval.

    python benchmarks/freeze_overhead.py
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import Seconds, median_seconds, plain, publish, set_up, timed

import torch  # isort: skip  # after _common, which sets the environment that torch reads

from mifo.config.load import load_config
from mifo.config.schema import MifoMethod
from mifo.core.freeze import ElementFreeze
from mifo.core.importance import ImportanceMap
from mifo.eval.score import make_evaluate
from mifo.methods.sft import demonstration_of, imitation_update
from mifo.train.build import build_run, make_grader, prepare
from mifo.train.run import Run
from mifo.types import Demonstration, Phase

RECIPE = "smollm2-arithmetic"
SHAPE_FLAGS = [  # written out, so that figures stay comparable when the recipe is tuned
    *("--method.rl.prompts-per-step", "16"),
    *("--method.rl.rollouts-per-prompt", "8"),
    *("--method.rl.updates-per-step", "1"),
    *("--method.buffer-size", "64"),
    *("--method.sft-batch-size", "16"),
    *("--rollout.max-response-tokens", "64"),
    *("--data.train-problems", "400"),
]
WARM_UP = 2


@dataclass(frozen=True, slots=True)
class Shape:
    """Steps of one interval."""

    rl_steps: int
    updates: int


def interval_shape(method: MifoMethod) -> Shape:
    """The shortest interval: every question fails and joins the buffer."""
    return Shape(-(-method.buffer_size // method.rl.prompts_per_step), -(-method.buffer_size // method.sft_batch_size))


def train_steps(run: Run, method: MifoMethod, shape: Shape, device: torch.device) -> dict[str, list[Seconds]]:
    """Seconds of the RL steps, the SFT updates and the meters of one interval, after two steps of each kind to warm up."""
    rl_phase = Phase(
        name="rl", optimizer="rl", prompts=method.rl.prompts_per_step, rollouts=method.rl.rollouts_per_prompt
    )
    sft_phase = Phase(name="sft", optimizer="sft")
    demonstrations = []

    def rl_step() -> None:
        groups = run.collect(rl_phase)
        run.learn(rl_phase, run.method.updates(rl_phase, groups))
        run.steps += 1
        demonstrations.append([d for group in groups if (d := demonstration_of(group)) is not None])

    def sft_update(batch: list[Demonstration]) -> None:
        update = imitation_update(
            method.sft,
            batch[: method.sft_batch_size],
            token_fraction=method.token_fraction,
            token_denominator=method.token_denominator,
            longest_demonstration=run.config.data.max_demonstration_tokens,
        )
        run.learn(sft_phase, [update])

    rl = [timed(rl_step, device)[0] for _ in range(WARM_UP + shape.rl_steps)]
    batches = (demonstrations * shape.updates)[: WARM_UP + shape.updates]
    sft = [timed(lambda batch=batch: sft_update(batch), device)[0] for batch in batches]
    meters = [
        timed(lambda: run.evaluate("forgetting meter", run.config.evaluation.meter_problems), device)[0]
        for _ in range(2)
    ]
    return {"rl_step": rl[WARM_UP:], "sft_update": sft[WARM_UP:], "meter": meters}


def freeze_steps(
    run: Run, importance: ImportanceMap, shape: Shape, repeats: int, device: torch.device
) -> dict[str, list[Seconds]]:
    """The parts of freezing. Before every repeat all parameters move by about one step of AdamW."""
    optimizer = run.parts.optimizers["sft"].optimizer
    generator = torch.Generator(device=device).manual_seed(0)
    rate = run.config.rl_optimizer.learning_rate
    for parameter in importance.parameters:
        parameter.grad = 1e-3 * torch.randn(parameter.shape, generator=generator, device=device)
    found: dict[str, list[Seconds]] = {
        name: [] for name in ("end_interval", "frozen_phase", "plain_phase", "begin_interval")
    }

    def frozen_phase() -> None:
        with ElementFreeze(importance.marks, importance.parameters, snapshot=importance.start) as freeze:
            for _ in range(shape.updates):
                freeze.mask_gradients()
                freeze.step(optimizer)

    def plain_phase() -> None:
        for _ in range(shape.updates):
            optimizer.step()

    for _ in range(WARM_UP + repeats):
        with torch.no_grad():
            for parameter in importance.parameters:
                parameter.add_(torch.randn(parameter.shape, generator=generator, device=device), alpha=rate)
        found["end_interval"].append(timed(importance.end_interval, device)[0])
        found["frozen_phase"].append(timed(frozen_phase, device)[0])
        found["plain_phase"].append(timed(plain_phase, device)[0])
        found["begin_interval"].append(timed(importance.begin_interval, device)[0])
    optimizer.zero_grad()
    return {name: runs[WARM_UP:] for name, runs in found.items()}


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the JSON object here instead")
    arguments = parser.parse_args()

    device = set_up()
    _, config = load_config(RECIPE, [*SHAPE_FLAGS, "--train.threads", str(torch.get_num_threads())])
    method = config.method
    assert isinstance(method, MifoMethod)
    with tempfile.TemporaryDirectory() as folder, make_grader(config) as grader:
        prepared = prepare(config, grader)
        run = build_run(prepared, grader, Path(folder) / "run", make_evaluate=make_evaluate, listener=lambda *_: None)
        importance = run.parts.importance
        assert importance is not None
        shape = interval_shape(method)
        parts = train_steps(run, method, shape, device)
        first = importance.end_interval()  # of what RL and SFT really moved
        parts |= freeze_steps(run, importance, shape, arguments.repeats, device)
    publish("freeze_overhead", summary(parts, method, first.fraction, device), device, arguments.out)


def summary(parts: dict[str, list[Seconds]], method: MifoMethod, frozen: float, device: torch.device) -> dict[str, Any]:
    """The share, on both clocks: sums over the steps of the interval, medians over the repeats of freezing."""
    shape = interval_shape(method)
    totals: dict[str, dict[str, float]] = {}
    for clock in ("cpu", "wall"):
        steps = {name: sum(getattr(run, clock) for run in parts[name]) for name in ("rl_step", "sft_update", "meter")}
        middle = {name: getattr(median_seconds(runs), clock) for name, runs in parts.items() if name not in steps}
        freeze = middle["end_interval"] + middle["frozen_phase"] - middle["plain_phase"] + middle["begin_interval"]
        interval = sum(steps.values()) + freeze
        found = {"rl_steps": steps["rl_step"], "sft_updates": steps["sft_update"], "meters": steps["meter"], **middle}
        found |= {"freeze": freeze, "interval": interval, "share": freeze / interval}
        found["share_without_meter"] = freeze / (interval - steps["meter"])
        totals[clock] = {name: round(value, 4) for name, value in found.items()}
    clock = "wall" if device.type == "cuda" else "cpu"
    return {
        "ratio": totals[clock]["share"],
        "ratio_without_meter": totals[clock]["share_without_meter"],
        "ratio_cpu": totals["cpu"]["share"],
        "ratio_wall": totals["wall"]["share"],
        "workload": f"recipe {RECIPE} with {shape.rl_steps} RL steps of {method.rl.prompts_per_step} x "
        f"{method.rl.rollouts_per_prompt} x 64 tokens, {shape.updates} SFT updates of {method.sft_batch_size} demonstrations, "
        "the meter twice",
        "frozen_fraction": round(frozen, 3),
        "seconds": totals,
        "repeats": {name: plain(runs) for name, runs in parts.items()},
    }


if __name__ == "__main__":
    main()
