"""What freezing costs: importance map, exact global top-k, hard freeze and snapshot as a share of one MIFO interval.

The interval is the shortest that the recipe smollm2-arithmetic can have, in a fixed shape: 4 RL steps of 16 prompts × 8
rollouts × 64 tokens, in which every question fails, SFT on the 64 demonstrations, and the forgetting meter before and after;
all through the recipe's own model, data, graders, engine and learner, with all-equal groups skipped and responses ending where
the model ends them. SFT is MIFO's default, one update with the whole buffer; `updates_of_16` is the same interval with four.
`ratio` = freeze / interval, in CPU-seconds on CPU and wall seconds on CUDA:

    freeze   = end_interval + begin_interval + (masked gradients, frozen steps, settling of all updates) − plain steps
    interval = 4 RL steps + SFT without a freeze + 2 meters + freeze

    python benchmarks/freeze_overhead.py
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
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
from mifo.types import Demonstration, Group, Phase, Update

RECIPE = "smollm2-arithmetic"
SHAPE_FLAGS = [  # written out, so that figures stay comparable when the recipe is tuned
    *("--method.rl.prompts-per-step", "16"),
    *("--method.rl.rollouts-per-prompt", "8"),
    *("--method.rl.updates-per-step", "1"),
    *("--method.buffer-size", "64"),
    *("--rollout.max-response-tokens", "64"),
]
WARM_UP = 2
RL_STEPS = 4


BATCHES = (64, 16)  # demonstrations of an SFT update: MIFO's default is the whole buffer


def train_steps(run: Run, method: MifoMethod, device: torch.device) -> dict[str, list[Seconds]]:
    """Seconds of the RL steps, of SFT on one buffer for each of `BATCHES`, and of the meters, warmed up."""
    rl_phase = Phase(
        name="rl", optimizer="rl", prompts=method.rl.prompts_per_step, rollouts=method.rl.rollouts_per_prompt
    )
    sft_phase = Phase(name="sft", optimizer="sft")
    demonstrations: list[Demonstration] = []

    def turn(phase: Phase, updates: Callable[[Sequence[Group]], list[Update]]) -> tuple[Group, ...]:
        """A turn of the loop without its change of phase: freezing is timed apart."""
        groups = run.collect(phase)
        reports = run.learn(phase, updates(groups))
        run.record(phase, groups, reports)
        assert reports
        assert all(report.taken for report in reports)
        return groups

    def rl_step() -> None:
        groups = turn(rl_phase, lambda groups: run.method.updates(rl_phase, groups))
        demonstrations.extend(d for group in groups if (d := demonstration_of(group)) is not None)

    def sft(batch: int) -> None:
        for start in range(0, method.buffer_size, batch):
            update = imitation_update(
                method.sft,
                demonstrations[start : start + batch],
                token_fraction=method.token_fraction,
                token_denominator=method.token_denominator,
                longest_demonstration=run.config.data.max_demonstration_tokens,
            )
            turn(sft_phase, lambda _, update=update: [update])

    rl = [timed(rl_step, device)[0] for _ in range(WARM_UP + RL_STEPS)]
    assert len(demonstrations) >= method.buffer_size
    sft(method.buffer_size)
    found = {"rl_step": rl[WARM_UP:]}
    found |= {f"sft_{batch}": [timed(lambda batch=batch: sft(batch), device)[0]] for batch in BATCHES}
    meter_problems = run.config.evaluation.meter_problems
    found["meter"] = [timed(lambda: run.evaluate("forgetting meter", meter_problems), device)[0] for _ in range(2)]
    return found


def freeze_steps(
    run: Run, importance: ImportanceMap, method: MifoMethod, repeats: int, device: torch.device
) -> dict[str, list[Seconds]]:
    """The parts of freezing. Before every repeat all parameters move by about one step of AdamW."""
    optimizer = run.parts.optimizers["sft"].optimizer
    generator = torch.Generator(device=device).manual_seed(0)
    rate = run.config.rl_optimizer.learning_rate
    for parameter in importance.parameters:
        parameter.grad = 1e-3 * torch.randn(parameter.shape, generator=generator, device=device)
    updates = [method.buffer_size // batch for batch in BATCHES]
    phases = [f"{kind}_phase_{batch}" for kind in ("frozen", "plain") for batch in BATCHES]
    found: dict[str, list[Seconds]] = {name: [] for name in ("end_interval", *phases, "begin_interval")}

    def frozen_phase(count: int) -> None:
        with ElementFreeze(importance.marks, importance.parameters, snapshot=importance.start) as freeze:
            for _ in range(count):
                freeze.mask_gradients()
                freeze.step(optimizer)

    def plain_phase(count: int) -> None:
        for _ in range(count):
            optimizer.step()

    for _ in range(WARM_UP + repeats):
        with torch.no_grad():
            for parameter in importance.parameters:
                parameter.add_(torch.randn(parameter.shape, generator=generator, device=device), alpha=rate)
        found["end_interval"].append(timed(importance.end_interval, device)[0])
        for name, work, count in zip(phases, [frozen_phase] * 2 + [plain_phase] * 2, updates * 2, strict=True):
            found[name].append(timed(lambda work=work, count=count: work(count), device)[0])
        found["begin_interval"].append(timed(importance.begin_interval, device)[0])
    optimizer.zero_grad()
    return {name: runs[WARM_UP:] for name, runs in found.items()}


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--recipe", default=RECIPE, help="another recipe of MIFO; its figures say nothing about this one's"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the JSON object here instead")
    arguments = parser.parse_args()

    device = set_up()
    _, config = load_config(arguments.recipe, [*SHAPE_FLAGS, "--train.threads", str(torch.get_num_threads())])
    method = config.method
    assert isinstance(method, MifoMethod)
    with tempfile.TemporaryDirectory() as folder, make_grader(config) as grader:
        prepared = prepare(config, grader)
        run = build_run(prepared, grader, Path(folder) / "run", make_evaluate=make_evaluate, listener=lambda *_: None)
        importance = run.importance
        assert importance is not None
        parts = train_steps(run, method, device)
        first = importance.end_interval()  # of what RL and SFT really moved
        parts |= freeze_steps(run, importance, method, arguments.repeats, device)
    publish("freeze_overhead", summary(parts, arguments.recipe, method, first.fraction, device), device, arguments.out)


def summary(
    parts: dict[str, list[Seconds]], recipe: str, method: MifoMethod, frozen: float, device: torch.device
) -> dict[str, Any]:
    """The shares, on both clocks: sums over the steps of the interval, medians over the repeats of freezing."""
    totals = {clock: {batch: _interval(parts, batch, clock) for batch in BATCHES} for clock in ("cpu", "wall")}
    clock = "wall" if device.type == "cuda" else "cpu"
    default, several = (totals[clock][batch] for batch in BATCHES)
    return {
        "ratio": default["share"],
        "ratio_cpu": totals["cpu"][BATCHES[0]]["share"],
        "ratio_wall": totals["wall"][BATCHES[0]]["share"],
        "ratio_without_meter": default["share_without_meter"],
        "updates_of_16": {"ratio": several["share"], "ratio_without_meter": several["share_without_meter"]},
        "workload": f"recipe {recipe} with {RL_STEPS} RL steps of {method.rl.prompts_per_step} x "
        f"{method.rl.rollouts_per_prompt} x 64 tokens, SFT on {method.buffer_size} demonstrations, the meter twice",
        "frozen_fraction": round(frozen, 3),
        "seconds": totals,
        "repeats": {name: plain(runs) for name, runs in parts.items()},
    }


def _interval(parts: dict[str, list[Seconds]], batch: int, clock: str) -> dict[str, float]:
    """Seconds of an interval with SFT updates of `batch` demonstrations."""
    found = {name: sum(getattr(run, clock) for run in parts[name]) for name in ("rl_step", f"sft_{batch}", "meter")}
    freezing = ("end_interval", f"frozen_phase_{batch}", f"plain_phase_{batch}", "begin_interval")
    middle = {name: getattr(median_seconds(parts[name]), clock) for name in freezing}
    freeze = sum(middle.values()) - 2 * middle[f"plain_phase_{batch}"]
    interval = sum(found.values()) + freeze
    found |= {**middle, "freeze": freeze, "interval": interval, "share": freeze / interval}
    found["share_without_meter"] = freeze / (interval - found["meter"])
    return {name: round(value, 4) for name, value in found.items()}


if __name__ == "__main__":
    main()
