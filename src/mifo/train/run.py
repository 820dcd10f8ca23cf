"""One run: its components, and what each line of the loop does with them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mifo.config.schema import Config
from mifo.core.freeze import ElementFreeze
from mifo.data.chat import Chat
from mifo.data.stream import ProblemStream
from mifo.errors import NumericsError
from mifo.methods import Method
from mifo.rewards import FailureWatch, Grader
from mifo.rollout.engine import Engine
from mifo.train.account import count
from mifo.train.checkpoint import Checkpoints, Snapshot
from mifo.train.collect import collect, make_group
from mifo.train.corpus import Corpus
from mifo.train.faults import Fault, check_state, check_weights
from mifo.train.guard import Guard
from mifo.train.journal import Journal
from mifo.train.kept_phases import keep_phase
from mifo.train.learner import Learner
from mifo.train.ledger import Ledger
from mifo.train.metrics import gap_alarm, group_metrics, score_record, tokens_per_second, update_record
from mifo.train.optim import ScheduledAdamW
from mifo.train.phases import as_merged, enter, leave_sft, make_importance, sft_is_open
from mifo.train.samples import sample_records
from mifo.train.scorer import Scorer
from mifo.train.scoring import score, scorer_metrics
from mifo.train.state import Saving, plain_state, restore_snapshot, take_snapshot
from mifo.train.stop import Stop
from mifo.train.storage import Storage
from mifo.train.tally import UpdateReport
from mifo.train.turn import Turn
from mifo.types import Group, Phase, Problem, Rollout, Score, Update, Verdict

Evaluate = Callable[[Engine, Sequence[Problem]], Score]
Listener = Callable[[str, Mapping[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The components a run is put together from (see `train.build`)."""

    config: Config
    folder: Path
    chat: Chat
    corpus: Corpus
    methods: tuple[Method, ...]  # one for each stage
    learner: Learner
    engine: Engine
    grader: Grader
    optimizers: Mapping[str, ScheduledAdamW]
    scorer: Scorer | None
    reference_hash: str | None  # of model.path, read at every start, where KL terms or a rejuvenation go back to it
    evaluate: Evaluate | None
    listener: Listener
    stop: Stop
    checkpoints: Checkpoints
    storage: Storage


class Run:
    """State and steps of one training run.

    What must survive a crash is in `snapshot`; everything random is a function of (seed, step): no generator state to keep.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.config, self.learner, self.engine = parts.config, parts.learner, parts.engine
        self.stream = ProblemStream(parts.corpus.train, parts.config.train.seed)
        self.stop, self.journal = parts.stop, Journal(parts.folder, parts.storage)
        self.saving = Saving(parts.checkpoints, background=parts.config.run.background_checkpoints)
        reward = parts.config.reward
        self.failures = FailureWatch(max_share=reward.max_failure_share, window=reward.failure_window)
        self.ledger = Ledger(
            parameters=sum(p.numel() for p in parts.learner.parameters),
            scorer_parameters=0 if parts.scorer is None else parts.scorer.parameters,
        )
        self.steps = 0  # steps that drew problems: what train.steps counts
        self.iterations = 0  # turns of the loop, SFT updates of an interval included
        self.version = 0  # optimizer updates taken: the version of the weights
        self.stage = 0  # of parts.methods
        self.stage_began = 0  # the steps before it
        self.importance = make_importance(parts.learner.parameters, self.method.freeze)
        self.phase: str | None = None
        self.adapted: str | None = (
            None  # the optimizer that the one of the adapters stands in for, while there are some
        )
        self.sft_phases = 0  # of the present stage, begun
        self.rejuvenations: list[dict[str, Any]] = []  # done so far: when, and what was reset
        self.meters: list[dict[str, Any]] = []  # one entry an SFT phase: accuracy before and after, what was frozen
        self.scores: dict[str, Any] = {}
        self.frozen: dict[str, Any] | None = None
        self.freeze: ElementFreeze | None = None  # of the SFT phase under way
        self.guard = Guard(parts.config.guard, parts.config.legacy.skip_above_norm)
        self.tainted: Fault | None = None  # what was collected in this turn cannot be learned from
        self.elapsed_before = 0.0
        self.verdicts_before: Mapping[str, int] = {}
        self.turn: Turn | None = None  # under way: collected, and not yet recorded
        self.evaluated, self.evaluated_flops = 0, 0.0  # step and FLOPs of the last evaluation that was due
        self.finished_at: int | None = None  # the turn after which this run was finished
        self.stopped = False  # broken off because somebody asked
        self.started = self.turn_started = time.perf_counter()

    @property
    def method(self) -> Method:
        """The method of the present stage."""
        return self.parts.methods[self.stage]

    @property
    def stage_record(self) -> Mapping[str, Any]:
        """The stage as records name it; {} in a run of one method."""
        if not self.config.stages:
            return {}
        number = self.config.stage_numbers[self.stage]
        return {"stage": number, "method": self.config.by_stage[self.stage].method.name}

    @property
    def metering(self) -> bool:
        """Accuracy after the last SFT phase is still to be measured."""
        return bool(self.meters) and "after" not in self.meters[-1]

    @property
    def grader_counts(self) -> Mapping[str, int]:
        """Verdicts on demonstrations, rollouts and held-out problems, earlier sessions included."""
        return {v.value: self.verdicts_before.get(v.value, 0) + self.parts.grader.counts.get(v, 0) for v in Verdict}

    # --- what the loop calls, in its order -------------------------------------------------------------------------

    def start(self) -> None:
        """Accuracy before training, unless this run was resumed; then what its last session did not come to."""
        self.started = self.turn_started = time.perf_counter()
        self.mark()
        if self.iterations == 0 and "before" not in self.scores:
            score = self.evaluate("before")
            self.scores["before"] = None if score is None else score_record(score)
            self.mark()
        if self.turn is None:
            self.evaluate_if_due()

    @property
    def finished(self) -> bool:
        """Enough steps (or minutes, FLOPs, tokens), and no SFT phase left half done."""
        spent = self.ledger.spent(self.config.train, self.elapsed / 60)
        return not self.in_sft_phase and (self.steps >= self.config.steps or spent is not None)

    @property
    def stage_is_over(self) -> bool:
        """Enough steps of the present stage, and no SFT phase left half done."""
        return not self.in_sft_phase and self.steps - self.stage_began >= self.config.by_stage[self.stage].train.steps

    @property
    def in_sft_phase(self) -> bool:
        """The next turn goes on with what was collected before, or begins to."""
        return self.method.next_phase().prompts == 0

    @property
    def elapsed(self) -> float:
        """Seconds of this run, earlier sessions included."""
        return self.elapsed_before + time.perf_counter() - self.started

    def enter(self, phase: Phase) -> None:
        """Change of phase: the importance map is updated where RL ends, everything is unfrozen where SFT ends."""
        enter(self, phase)

    def collect(self, phase: Phase) -> tuple[Group, ...]:
        """Problems with rollouts, verdicts and rewards; () where the phase draws no problems."""
        if self.turn is None:  # otherwise the last session was stopped in the middle of this turn
            self.turn = Turn(collect(self, phase), self.method.state_dict())
            self.mark()
        return self.turn.groups

    def score(self, phase: Phase, groups: tuple[Group, ...]) -> tuple[Group, ...]:
        """The groups with a number for each token where the method has a second model, which learns from them too."""
        return groups if phase.scorer_learns is None else score(self, phase)

    def learn(self, phase: Phase, updates: Sequence[Update]) -> list[UpdateReport]:
        """The optimizer steps of this turn. π_old is computed beforehand only for updates after the first.

        Raises:
            NumericsError: too many updates in a row were skipped, or weights are not finite.
        """
        self.guard.begin(phase.name)
        if self.tainted is not None:
            fault, self.tainted = self.tainted, None
            self.heed(phase.name, self.guard, fault)
            count(self, phase, (), ())
            return []
        importance, adapters = self.importance, self.learner.adapters
        if phase.freeze is not None and importance is not None and self.freeze is None and adapters is None:
            self.freeze = ElementFreeze(
                importance.marks, importance.parameters, mode=phase.freeze.mode, snapshot=importance.start
            )
        assert self.turn is not None
        optimizer = self.parts.optimizers[phase.optimizer] if adapters is None else adapters.optimizer
        budget = self.learner.micro_batch_tokens
        with self.ledger.timed(phase.name):
            with self.stop.window():
                updates = self.turn.prepared(updates, self._with_old_policy)
            budget = self.heed_budget(self.learner, budget)
            self.mark()
            for update in updates[len(self.turn.reports) :]:  # all, unless the last session was stopped among them
                report = self.learner.apply(update, optimizer, freeze=self.freeze, guard=self.guard, step=self.version)
                self.turn.reports.append(report)
                self.version += report.moved
                self.heed(phase.name, self.guard, report.fault)
                budget = self.heed_budget(self.learner, budget)
                self.mark()
        count(self, phase, updates, self.turn.reports)
        return self.turn.reports

    def record(self, phase: Phase, groups: Sequence[Group], reports: Sequence[UpdateReport]) -> None:
        """Metrics and samples of this turn; counts it."""
        if phase.prompts:
            self.steps += 1
        self.iterations += 1
        record: dict[str, Any] = {
            "iteration": self.iterations,
            "step": self.steps,
            "phase": phase.name,
            **self.stage_record,
            "elapsed": self.elapsed,
            "epoch": self.stream.epoch,
            "tokens_per_second": tokens_per_second(groups, self._turn_seconds()),
            **self.method.progress(),
            **group_metrics(groups),
            "updates": [update_record(report) for report in reports],
        }
        if phase.scorer_learns is not None and self.parts.scorer is not None and self.turn is not None:
            record[self.parts.scorer.name] = scorer_metrics(self.turn.groups, self.turn.lessons)
        self.emit("metrics", record)
        for sample in sample_records(groups, self.config.run.samples_per_step, self.parts.chat.decode):
            self.emit("samples", {"step": self.steps, **sample})
        if (alarm := gap_alarm(reports)) is not None:
            self.emit("events", {"event": "alarm", "step": self.steps, "alarm": "sampler_gap", **alarm})
        self.turn = None
        self.mark()

    def evaluate_if_due(self) -> None:
        """Accuracy every `evaluation.every_steps` steps, or past each multiple of `evaluation.every_flops`."""
        evaluation, flops = self.config.evaluation, self.ledger.flops
        steps, every = evaluation.every_steps, evaluation.every_flops
        by_steps = steps is not None and self.steps > self.evaluated and self.steps % steps == 0
        by_flops = every is not None and flops // every > self.evaluated_flops // every
        if by_steps or (by_flops and not self.in_sft_phase and not self.finished):
            self.evaluate(f"step {self.steps}")
            self.evaluated, self.evaluated_flops = self.steps, flops
            self.mark()

    def save_if_due(self) -> None:
        """A checkpoint every `run.checkpoint_steps` turns of the loop."""
        self._report_saves()
        every = self.config.run.checkpoint_steps
        if every is not None and self.iterations % every == 0:
            self.save()

    def finish(self) -> None:
        """Leave the last phase, measure, save; nothing where that was done."""
        if self.finished_at == self.iterations:
            return
        was_open = sft_is_open(self)
        if was_open:
            leave_sft(self)
        keep_phase(self)
        if was_open:
            self.phase = None
            self.mark()
        score = self.evaluate("after")
        self.scores["after"] = None if score is None else score_record(score)
        self.finished_at = self.iterations
        self.mark()
        self.save()

    # --- pieces of a step --------------------------------------------------------------------------------------------

    def evaluate(self, label: str, problems: int | None = None) -> Score | None:
        """Measure on held-out problems; None where the run has none."""
        if self.parts.evaluate is None:
            return None
        with self.ledger.timed("evaluation"), as_merged(self), self.stop.window():
            self.sync_engine()
            try:
                score = self.parts.evaluate(self.engine, self.parts.corpus.evaluation[:problems])
            except NumericsError:
                check_weights(self.learner.policy.model)  # says more, where they are the reason
                raise
        self.ledger.evaluation_tokens += round(score.response_length * sum(score.verdicts.values()))
        place = {"label": label, "step": self.steps, "flops": self.ledger.flops}
        self.emit("events", {"event": "evaluation", **place, "phase": self.phase, **score_record(score)})
        if problems is None:
            self.emit("evaluations", {**place, "problems": dict(score.by_problem)})
        return score

    def sync_engine(self) -> None:
        """Give the engine the current weights unless it has them."""
        if self.engine.version != self.version:
            self.engine.update(self.learner.policy.model, self.version)

    def make_group(self, problem: Problem, rollouts: Sequence[Rollout], verdicts: Sequence[Verdict]) -> Group:
        """A problem of the training data with its rollouts, their verdicts, and the rewards these mean."""
        return make_group(self.parts, problem, rollouts, verdicts)

    def _with_old_policy(self, update: Update) -> Update:
        """π_old of an update that comes after others of the same rollouts: the policy as it is now, before any of them."""
        if not any(term.uses_old_policy for term in update.terms):
            return update
        return replace(update, old_logprobs=tuple(self.learner.logprobs(update.sequences)))

    def _turn_seconds(self) -> float:
        """Wall time since the turn before was recorded."""
        before, self.turn_started = self.turn_started, time.perf_counter()
        return self.turn_started - before

    def heed(self, phase: str, guard: Guard, fault: Fault | None) -> None:
        """Write down what is wrong with an update, and stop where too many were."""
        if fault is not None:
            self.emit("events", {"event": "fault", "step": self.steps, "phase": phase, **fault.record()})
        guard.count(fault)

    def heed_budget(self, learner: Learner, before: int) -> int:
        """Write down that memory ran out and micro-batches are smaller now; returns their tokens."""
        now = learner.micro_batch_tokens
        if now != before:
            self.emit("events", {"event": "memory", "step": self.steps, "micro_batch_tokens": now, "before": before})
        return now

    def emit(self, stream: str, record: Mapping[str, Any]) -> None:
        """Write a record to the run folder and show it."""
        self.journal.write(stream, record)
        for log, missing in self.journal.take_lost().items():
            self.emit("events", {"event": "log_lost", "log": log, "bytes": missing})
        self.parts.listener(stream, record)

    # --- state -------------------------------------------------------------------------------------------------------

    def mark(self) -> None:
        """Everything up to here is done: a checkpoint from now on resumes here."""
        self.saving.mark(plain_state(self))

    def save(self) -> None:
        """A checkpoint of the last mark; in the background if the [run] table says so.

        Raises:
            CheckpointError: this save, or the one before it, failed.
            NumericsError: weights or moments are not finite; the checkpoints there are stay as they are.
        """
        adapters = self.learner.adapters
        others = {} if adapters is None else adapters.named_tensors()
        what = "a checkpoint would hold weights or moments"
        check_state(self.learner.policy.model, self.parts.optimizers, what, others)
        if self.parts.scorer is not None:
            self.parts.scorer.check(what)
        with self.ledger.timed("checkpoint"):
            self.journal.sync()
            self.saving.save(self.snapshot)
        self._report_saves()

    def save_stopped(self) -> None:
        """The state as a stop left it, unless it is saved already."""
        self.stop.close()
        self.stopped = True
        if not self.saving.up_to_date:
            self.save()

    def close(self) -> None:
        """Wait for the last checkpoint and close the logs.

        Raises:
            CheckpointError: the last checkpoint could not be written.
        """
        try:
            self.saving.writer.wait()
            self._report_saves()
        finally:
            self.journal.close()

    def _report_saves(self) -> None:
        for iteration in self.saving.writer.poll():
            self.emit("events", {"event": "checkpoint", "step": self.steps, "iteration": iteration})
        for path, reason in self.parts.checkpoints.take_not_removed():
            self.emit("events", {"event": "not_removed", "step": self.steps, "folder": str(path), "reason": reason})

    def snapshot(self) -> Snapshot:
        """All state of the last mark, by component; the tensors are the live ones."""
        return take_snapshot(self, self.saving.marked)

    def restore(self, snapshot: Snapshot | None) -> None:
        """Continue from a snapshot, in the same bits; or from the beginning, with empty logs, where there is none."""
        lost = self.journal.load_state_dict({}) if snapshot is None else restore_snapshot(self, snapshot)
        for log, missing in lost.items():
            self.emit("events", {"event": "log_lost", "log": log, "bytes": missing})
