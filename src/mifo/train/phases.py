"""Where a run changes its phase or its stage: what is measured, frozen, adapted and begun anew there.

    RL → SFT   accuracy; C̃, TopK, M; adapters where the phase trains some
    SFT → RL   adapters merged; everything unfrozen; accuracy, which the method hears of; rejuvenation; θ_RL,start ← θ
    stage      accuracy; optimizers without moments and with the settings of the next stage, a map of its own; rejuvenation
    → RL       a second model made anew from θ, where a stage begins

A stop may come while accuracy is measured or a rejuvenation calibrates, and nowhere else: every `mark` has all before it done
and nothing after it.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import nn

from mifo.core.freeze import restore_frozen
from mifo.core.importance import ImportanceMap
from mifo.core.intervals import paired_interval
from mifo.train.adapters import Adapters
from mifo.train.collect import derive_seed
from mifo.train.kept_phases import keep_phase
from mifo.train.metrics import freeze_record, score_record
from mifo.train.reference import refer
from mifo.train.rejuvenate import rejuvenate_before_stage, rejuvenate_between_intervals
from mifo.types import Freeze, LowRank, Phase, Score

if TYPE_CHECKING:
    from mifo.train.run import Run

BY_PROBLEM = "before_by_problem"  # of an entry whose phase is open


def enter(run: Run, phase: Phase) -> None:
    """Change to the phase of the coming turn, unless it is that of the last one."""
    changes = phase.name != run.phase
    if changes and run.phase == "sft":
        leave_sft(run)
        rejuvenate_between_intervals(run)
    if refer(run.learner, _with_reference(run, phase)):
        run.mark()
    if not changes:
        return
    if phase.name == "sft" and run.phase is not None and phase.metered:
        _enter_sft(run, phase)
    keep_phase(run)
    if phase.fresh:
        run.parts.optimizers[phase.optimizer].reset()
    if phase.scorer_learns is not None and run.parts.scorer is not None and (phase.fresh or run.phase is None):
        run.parts.scorer.restart(run.learner.policy)
    if phase.adapters is not None:
        attach_adapters(run, phase.adapters, phase.optimizer)
    run.phase = phase.name
    run.sft_phases += phase.name == "sft"
    run.emit("events", {"event": "phase", "phase": phase.name, "step": run.steps, **(run.frozen or {})})
    run.mark()


def _with_reference(run: Run, phase: Phase) -> Phase:
    """KL terms of a later stage compare with the policy as the stage found it; of the first, too, if it was rejuvenated."""
    if run.stage == 0 and run.config.rejuvenation_before[0] is None:
        return phase
    own = "" if phase.reference is None else f": {phase.reference}"
    return replace(phase, reference=f"stage {run.stage + 1}{own}")


def _enter_sft(run: Run, phase: Phase) -> None:
    run.ledger.intervals += 1
    before = _meter(run)
    run.frozen = None
    if phase.freeze is not None and run.importance is not None:
        with run.ledger.timed("freeze"):
            report = run.importance.end_interval(phase.freeze.top)
        run.frozen = freeze_record(report) | {"freeze_top": phase.freeze.top}
    entry: dict[str, Any] = {"interval": run.ledger.intervals, "step": run.steps, "flops": run.ledger.flops}
    entry |= {**run.stage_record, "before": None if before is None else before.accuracy.value}
    frozen = run.frozen or {"frozen_fraction": 0.0, "freeze_top": 0.0}
    entry |= {name: frozen[name] for name in ("freeze_top", "frozen_fraction")}
    run.meters.append(
        entry | {"demonstrations": 0, BY_PROBLEM: [] if before is None else list(before.by_problem.values())}
    )


def sft_is_open(run: Run) -> bool:
    """The run stands in an SFT phase that something is still to be done for."""
    return run.phase == "sft" and (run.learner.adapters is not None or run.metering)


def leave_sft(run: Run) -> None:
    """End an SFT phase; may be called again where it was broken off."""
    if run.freeze is not None:
        with run.ledger.timed("freeze"):
            run.freeze.settle()
    if run.learner.adapters is not None:
        _merge_adapters(run, run.learner.adapters)
    run.frozen = run.freeze = None
    if run.metering:
        entry, score = run.meters[-1], _meter(run)
        before, after = entry.pop(BY_PROBLEM, []), [] if score is None else list(score.by_problem.values())
        entry["after"] = None if score is None else score.accuracy.value
        entry["change_interval"] = _change_interval(before, after)
        run.emit("events", {"event": "sft_phase", **entry})
        if entry["before"] is not None and entry["after"] is not None:
            run.method.sft_measured(entry["before"], entry["after"])
    if run.importance is not None:
        with run.ledger.timed("freeze"):
            run.importance.begin_interval()


def _meter(run: Run) -> Score | None:
    if not run.config.evaluation.around_sft:
        return None
    return run.evaluate("forgetting meter", run.config.evaluation.meter_problems)


def _change_interval(before: Sequence[float], after: Sequence[float]) -> list[float] | None:
    """Of the change in accuracy, paired by problem; None where one was not measured."""
    if not before or not after:
        return None
    found = paired_interval(before, after)
    return [found.low, found.high]


# --- adapters ----------------------------------------------------------------------------------------------------------


def attach_adapters(run: Run, shape: LowRank, optimizer: str) -> Adapters:
    """New adapters for the phase that begins, or for the state of one that goes on; their optimizer stands in for `optimizer`."""
    weights, outer = run.learner.parameters, run.parts.optimizers[optimizer]
    seed = derive_seed(run.config.train.seed, "adapters", run.version)
    adapters = Adapters(run.learner.policy.body, weights, shape, outer.config, seed=seed)
    adapters.optimizer.updates = outer.updates
    run.learner.adapters, run.adapted = adapters, optimizer
    return adapters


def _merge_adapters(run: Run, adapters: Adapters) -> None:
    adapters.merge(lambda: _keep_frozen(run))
    assert run.adapted is not None
    run.parts.optimizers[run.adapted].updates = adapters.optimizer.updates  # the schedule goes on in the next phase
    run.learner.adapters = run.adapted = None
    run.mark()


def _keep_frozen(run: Run) -> None:
    """θ ← θ + (1 − M) ⊙ ΔW: the elements that this phase freezes keep their bits."""
    if run.frozen is not None and run.importance is not None:
        restore_frozen(run.importance.parameters, run.importance.start, run.importance.marks)


def as_merged(run: Run) -> AbstractContextManager[None]:
    """The model as the end of the phase would leave it; as it is, where there are no adapters."""
    adapters = run.learner.adapters
    return nullcontext() if adapters is None else adapters.merged(lambda: _keep_frozen(run))


# --- stages ------------------------------------------------------------------------------------------------------------


def make_importance(parameters: list[nn.Parameter], freeze: Freeze | None) -> ImportanceMap | None:
    """The importance map of a method that freezes."""
    if freeze is None:
        return None
    return ImportanceMap(
        parameters, top=freeze.top, history=freeze.history, scope=freeze.scope, fill_ties=freeze.fill_ties
    )


def change_stage_if_due(run: Run) -> None:
    """On to the next stage where this one has its steps and no SFT phase is half done; and what stands before a stage."""
    if run.stage_is_over and run.stage < len(run.parts.methods) - 1:
        _change_stage(run)
    rejuvenate_before_stage(run)


def _change_stage(run: Run) -> None:
    if sft_is_open(run):
        leave_sft(run)
    keep_phase(run)
    run.phase = None
    run.mark()
    name = f"after stage {run.config.stage_numbers[run.stage]}"
    score = run.evaluate(name)
    run.scores[name] = None if score is None else score_record(score)
    run.stage, run.stage_began, run.sft_phases = run.stage + 1, run.steps, 0
    run.guard.forget()
    set_up_stage(run)
    run.emit("events", {"event": "stage", "step": run.steps, **run.stage_record})
    run.mark()


def set_up_stage(run: Run) -> None:
    """What belongs to one stage, as it begins: optimizers without moments, an empty importance map."""
    config = run.config.by_stage[run.stage]
    run.parts.optimizers["rl"].restart(config.rl_optimizer)
    run.parts.optimizers["sft"].restart(config.sft_optimizer)
    run.importance = None  # frees the old one first
    run.importance = make_importance(run.learner.parameters, run.method.freeze)
