"""Every finished run behind the findings of a folder as a row of figures, so that what was found can be counted again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mifo.lab.arena_results import SUMMARY
from mifo.lab.paper.finding import Finding
from mifo.lab.paper.plan import Plan
from mifo.lab.trials import RUNS, Trial
from mifo.train.checkpoint import read_json

FIGURES = (
    "problems", "accuracy_before", "accuracy_after", "response_length_before", "response_length_after", "rl_steps", "sft_steps",
    "demonstrations_used", "frozen_fraction", "flops",
)  # fmt: skip


def run_rows(plan: Plan, findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """A row for each finished run of these findings and for each that one began from, in the order in which they are made.

    Returns:
        Of the runs that `plan.folder` holds: none where it has records of findings alone. Accuracies and `reset_neurons` are
        shares; lengths are in tokens.

    Raises:
        CheckpointError: a summary is damaged.
    """
    trials: dict[str, Trial] = {}
    for finding in findings:
        for trial in finding.trials(plan):
            for one in trial.lineage:
                trials.setdefault(one.name, one)
    places = {name: plan.folder / RUNS / name / SUMMARY for name in trials}
    return [_row(trials[name], read_json(path)) for name, path in places.items() if path.is_file()]


def _row(trial: Trial, summary: Mapping[str, Any]) -> dict[str, Any]:
    name, _, seed = trial.name.rpartition("-seed")
    stages = [stage.get("accuracy_after") for stage in summary.get("stages") or []]
    resets = [event["neuron_share"] for event in summary.get("rejuvenations") or []]
    return {
        "run": name,
        "seed": int(seed),
        "after": trial.after.name.rpartition("-seed")[0] if trial.after else "",
        "method": summary.get("method"),
        **{figure: summary.get(figure) for figure in FIGURES},
        "seconds": round(summary["seconds"], 1),
        "accuracy_after_stages": " ".join(f"{accuracy:g}" for accuracy in stages if accuracy is not None),
        "reset_neurons": " ".join(f"{share:.4g}" for share in resets),
    }
