"""Finished runs made on the spot, for tests of comparisons."""

from __future__ import annotations

import json

from mifo.config.decode import encode
from mifo.config.load import load_config
from mifo.lab.arena_results import RunResult, SftPhase

PROBLEMS = tuple(f"p{i}" for i in range(4))


def make_result(
    entry="mifo", seed=0, scores=(1, 1, 0, 0), *, ood=None, before=None, flops=1e12, **changes
) -> RunResult:
    """A run with one score a problem."""
    _, config = load_config("tiny", ["--train.seed", str(seed)])
    values = {
        "name": f"{entry}-seed{seed}",
        "entry": entry,
        "seed": seed,
        "rates": (1e-3, 2e-3),
        "config": config,
        "accuracy": sum(scores) / len(scores),
        "by_problem": dict(zip(PROBLEMS, map(float, scores), strict=False)),
        "by_problem_before": dict.fromkeys(PROBLEMS, 0.0) if before is None else before,
        "ood": None if ood is None else dict(zip(PROBLEMS, map(float, ood), strict=False)),
        "response_length": 20.0,
        "truncated": 0.25,
        "phases": (SftPhase(flops=4e11, before=0.5, after=0.25), SftPhase(flops=8e11, before=0.25, after=0.5)),
        "curve": ((0.0, 0.0), (flops / 2, 0.25), (flops, sum(scores) / len(scores))),
        "movement": 2.0,
        "relative_movement": 0.01,
        "flops": flops,
        "tokens": 1000,
        "steps": 40,
        "seconds": 120.0,
        "unique_problems": 80,
        "demonstrations": 64,
        "unique_demonstrations": 32,
        "data": "abc",
    }
    return RunResult(**(values | changes))


def write_run(folder, *, flags=(), accuracy=0.5, flops=1e10, **summary):
    """A run folder with what a comparison reads, as a finished run leaves it."""
    _, config = load_config("tiny", ["--train.threads", "1", *flags])
    folder.mkdir(parents=True)
    verdicts = {f"p{i}": float(i < 10 * accuracy) for i in range(10)}
    values = {
        "accuracy_after": accuracy,
        "response_length_after": 9.0,
        "truncated_after": 0.0,
        "sft_phases": [{"interval": 1, "step": 2, "flops": 4e9, "before": 0.2, "after": 0.1}],
        "flops": flops,
        "tokens": 500,
        "steps": 12,
        "seconds": 6.0,
        "unique_problems": 80,
        "demonstrations_used": 64,
        "unique_demonstrations": 40,
        "data": "same",
    }
    evaluations = [
        {"label": "before", "step": 0, "flops": 0.0, "problems": dict.fromkeys(verdicts, 0.0)},
        {"label": "after", "step": 12, "flops": flops, "problems": verdicts},
    ]
    (folder / "config.json").write_text(json.dumps(encode(config)))
    (folder / "summary.json").write_text(json.dumps(values | summary))
    (folder / "evaluations.jsonl").write_text("".join(json.dumps(record) + "\n" for record in evaluations))
    return folder
