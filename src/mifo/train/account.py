"""What a turn adds to the ledger."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mifo.train.rows import demonstrated
from mifo.train.scoring import fed_tokens
from mifo.train.tally import UpdateReport
from mifo.types import Phase, Update

if TYPE_CHECKING:
    from mifo.train.run import Run


def count(run: Run, phase: Phase, updates: Sequence[Update], reports: Sequence[UpdateReport]) -> None:
    """Count the updates of a turn, its tokens, the demonstrations that had a part, and what the scorer did."""
    ledger = run.ledger
    ledger.updates += sum(r.taken for r in reports)
    tokens, fed = sum(r.tokens for r in reports), sum(r.fed_tokens for r in reports)
    ids = demonstrated([u for u, report in zip(updates, reports, strict=True) if report.taken])
    ledger.used_demonstrations(ids)
    if phase.name == "sft":
        ledger.sft_steps += 1
        ledger.sft_tokens, ledger.sft_fed_tokens = ledger.sft_tokens + tokens, ledger.sft_fed_tokens + fed
        if run.learner.adapters is not None:
            ledger.trained_adapters(fed, sum(p.numel() for p in run.learner.trained))
        if run.metering:
            run.meters[-1]["demonstrations"] += len(ids)
    else:
        ledger.rl_steps += 1
        ledger.rl_tokens, ledger.rl_fed_tokens = ledger.rl_tokens + tokens, ledger.rl_fed_tokens + fed
    scorer, turn = run.parts.scorer, run.turn
    if scorer is not None and turn is not None and turn.scored:
        ledger.scored_fed_tokens += scorer.passes * fed_tokens(turn.groups)
        ledger.scorer_updates += sum(lesson.taken for lesson in turn.lessons)
        ledger.scorer_fed_tokens += sum(lesson.fed_tokens for lesson in turn.lessons)
