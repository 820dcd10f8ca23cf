"""What a run measures, as plain data for its JSONL files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from mifo.core.importance import FreezeReport
from mifo.train.tally import UpdateReport
from mifo.types import Group, Score, Verdict

GAP_ADVICE = (
    "the rollouts do not come from the weights that are trained: look for a stale or damaged copy, set rollout.compute = "
    "'float32' if it is rounding, or correct for it with method.rl.importance_cap = 2"
)


def freeze_record(report: FreezeReport) -> dict[str, Any]:
    """What a selection froze, for events."""
    return {
        "frozen_fraction": report.fraction,
        "moved_fraction": report.moved / max(1, report.elements),
        "freeze_threshold": report.threshold,
    }


def score_record(score: Score) -> dict[str, Any]:
    """A score as plain data, without its single problems."""
    plain = asdict(score)
    del plain["by_problem"]
    plain["accuracy"] = score.accuracy.value
    plain["accuracy_low"], plain["accuracy_high"] = score.accuracy.low, score.accuracy.high
    plain["problems"] = score.accuracy.count
    plain["by_source"] = {name: part.value for name, part in score.by_source.items()}
    return plain


def update_record(report: UpdateReport) -> dict[str, Any]:
    """One update as plain data; of a fault only its kind, the event in events.jsonl holds the rest."""
    plain = asdict(report)
    plain["fault"] = None if report.fault is None else report.fault.kind
    return plain


def gap_alarm(reports: Sequence[UpdateReport]) -> dict[str, Any] | None:
    """The gap between sampler and trainer, its limit and what to do, where the first update that measured it exceeds it."""
    for report in reports:
        if report.sampler_gap is not None and report.sampler_gap_limit is not None:
            exceeded = report.sampler_gap > report.sampler_gap_limit
            found = {"value": report.sampler_gap, "limit": report.sampler_gap_limit, "advice": GAP_ADVICE}
            return found if exceeded else None
    return None


def group_metrics(groups: Sequence[Group]) -> dict[str, Any]:
    """Accuracy, reward, verdicts and lengths of the rollouts of one step, all rounds of it; {} where there were none.

    Lengths are of whole responses. Where some began inside a demonstration, `begun` is their share and `prefix_length` the mean
    length of what they began with.
    """
    groups = [group for group in groups if group.rollouts]
    rollouts = [r for group in groups for r in group.rollouts]
    if not rollouts:
        return {}
    verdicts = [v for group in groups for v in group.verdicts]
    prefixes = [r.prefix_tokens for r in rollouts if r.prefix_tokens]
    begun = {"begun": len(prefixes) / len(rollouts), "prefix_length": sum(prefixes) / len(prefixes)} if prefixes else {}
    return begun | {
        "prompts": len(groups),
        "accuracy": sum(v is Verdict.CORRECT for v in verdicts) / len(verdicts),
        "reward": sum(r for group in groups for r in group.rewards) / len(rollouts),
        "verdicts": {v.value: verdicts.count(v) for v in Verdict},
        "grading_errors": verdicts.count(Verdict.ERROR) / len(verdicts),
        "grading_timeouts": verdicts.count(Verdict.TIMEOUT) / len(verdicts),
        "all_equal_groups": sum(len(set(group.rewards)) == 1 for group in groups) / len(groups),
        "response_length": sum(len(r.token_ids) for r in rollouts) / len(rollouts),
        "truncated": sum(r.stop == "length" for r in rollouts) / len(rollouts),
    }


def tokens_per_second(groups: Sequence[Group], seconds: float) -> float | None:
    """Response tokens sampled in a turn over its wall time, training included; None where none were."""
    tokens = sum(len(r.logprobs) for group in groups for r in group.rollouts)
    return tokens / seconds if tokens else None
