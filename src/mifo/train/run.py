"""One run: its components, and what each line of the loop does with them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from mifo.config.schema import Config
from mifo.core.freeze import ElementFreeze
from mifo.core.importance import ImportanceMap
from mifo.data.chat import Chat
from mifo.data.stream import ProblemStream
from mifo.errors import CheckpointError, NumericsError
from mifo.methods import Method
from mifo.rewards import Answer, FailureWatch, Grader, check_rewards
from mifo.rollout.engine import Engine
from mifo.train.checkpoint import Snapshot, save_checkpoint
from mifo.train.corpus import Corpus
from mifo.train.faults import Fault, bad_rewards, bad_rollouts, check_state, check_weights
from mifo.train.guard import Guard
from mifo.train.journal import Journal
from mifo.train.learner import Learner
from mifo.train.ledger import Ledger
from mifo.train.metrics import freeze_record, gap_alarm, group_metrics, score_record, update_record
from mifo.train.optim import ScheduledAdamW
from mifo.train.tally import UpdateReport
from mifo.types import Group, Phase, Problem, Rollout, Sampling, Score, Update, Verdict

Evaluate = Callable[[Engine, Sequence[Problem]], Score]
Listener = Callable[[str, Mapping[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Parts:
    """The components a run is put together from (see `train.build`)."""

    config: Config
    folder: Path
    chat: Chat
    corpus: Corpus
    method: Method
    learner: Learner
    engine: Engine
    grader: Grader
    optimizers: Mapping[str, ScheduledAdamW]
    importance: ImportanceMap | None
    evaluate: Evaluate | None
    listener: Listener


class Run:
    """State and steps of one training run.

    Everything that must survive a crash is in `snapshot`; everything random is a function of (seed, step), so there is no
    generator state to keep.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.config, self.method, self.learner, self.engine = parts.config, parts.method, parts.learner, parts.engine
        self.stream = ProblemStream(parts.corpus.train, parts.config.train.seed)
        self.journal = Journal(parts.folder)
        reward = parts.config.reward
        self.failures = FailureWatch(max_share=reward.max_failure_share, window=reward.failure_window)
        self.ledger = Ledger(parameters=sum(p.numel() for p in parts.learner.parameters))
        self.steps = 0  # steps that drew problems: what train.steps counts
        self.iterations = 0  # turns of the loop, SFT updates of an interval included
        self.version = 0  # optimizer updates taken: the version of the weights
        self.phase: str | None = None
        self.meters: list[dict[str, Any]] = []  # one entry an SFT phase: accuracy before and after, what was frozen
        self.scores: dict[str, Any] = {}
        self.frozen: dict[str, Any] | None = None
        self.freeze: ElementFreeze | None = None  # of the SFT phase under way
        self.guard = Guard(parts.config.guard)
        self.tainted: Fault | None = None  # what was collected in this turn cannot be learned from
        self.elapsed_before = 0.0
        self.verdicts_before: Mapping[str, int] = {}
        self.interrupted = False  # somebody asked to stop: the loop saves after the turn under way
        self.started = self.turn_started = time.perf_counter()

    @property
    def method_name(self) -> str:
        """Tag of the method."""
        return self.config.method.name

    @property
    def grader_counts(self) -> Mapping[str, int]:
        """Verdicts on demonstrations, rollouts and held-out problems, earlier sessions included."""
        return {v.value: self.verdicts_before.get(v.value, 0) + self.parts.grader.counts.get(v, 0) for v in Verdict}

    # --- what the loop calls, in its order -------------------------------------------------------------------------

    def start(self) -> None:
        """Accuracy before training, unless this run was resumed."""
        self.started = self.turn_started = time.perf_counter()
        if self.iterations == 0 and "before" not in self.scores:
            score = self.evaluate("before")
            self.scores["before"] = None if score is None else score_record(score)

    @property
    def finished(self) -> bool:
        """Enough steps (or minutes), and no SFT phase left half done."""
        half_done = self.method.next_phase().prompts == 0
        minutes = self.config.train.minutes
        late = minutes is not None and self.elapsed >= 60 * minutes
        return not half_done and (self.steps >= self.config.train.steps or late)

    @property
    def elapsed(self) -> float:
        """Seconds of this run, earlier sessions included."""
        return self.elapsed_before + time.perf_counter() - self.started

    def enter(self, phase: Phase) -> None:
        """Change of phase: the importance map is updated where RL ends, everything is unfrozen where SFT ends."""
        if phase.name == self.phase:
            return
        if self.phase == "sft":
            self._leave_sft()
        if phase.name == "sft" and self.phase is not None:
            self._enter_sft(phase)
        self.phase = phase.name
        self.emit("events", {"event": "phase", "phase": phase.name, "step": self.steps, **(self.frozen or {})})

    def collect(self, phase: Phase) -> tuple[Group, ...]:
        """Problems with rollouts, verdicts and rewards; () where the phase draws no problems."""
        if phase.prompts == 0:
            return ()
        problems = self.stream.take(phase.prompts)
        self.ledger.saw_problems([p.id for p in problems])
        if phase.rollouts == 0:
            return tuple(self._group(p, (), ()) for p in problems)
        prompts = [self.parts.corpus.encoded[p.id].prompt_ids for p in problems]
        with self.ledger.timed("rollout"):
            self.sync_engine()
            seed = derive_seed(self.config.train.seed, "rollout", self.steps)
            try:
                rollouts = self.engine.generate(prompts, phase.rollouts, self._sampling(), seed)
            except NumericsError as error:
                check_weights(self.learner.policy.model)
                self.tainted = bad_rollouts(error, problems)
                return ()
        self.ledger.prefilled_tokens += sum(map(len, prompts))
        self.ledger.generated_tokens += sum(len(r.token_ids) for row in rollouts for r in row)
        for row in rollouts:
            assert all(r.weight_version == self.version for r in row), "rollouts of another version of the weights"
        with self.ledger.timed("reward"):
            verdicts = self._grade(problems, rollouts)
        groups = tuple(self._group(p, row, v) for p, row, v in zip(problems, rollouts, verdicts, strict=True))
        self.tainted = bad_rewards(groups)
        return groups

    def learn(self, phase: Phase, updates: Sequence[Update]) -> list[UpdateReport]:
        """The optimizer steps of this turn. π_old is computed beforehand only for updates after the first.

        Raises:
            NumericsError: too many updates in a row were skipped, or weights are not finite.
        """
        self.guard.begin(phase.name)
        if self.tainted is not None:
            fault, self.tainted = self.tainted, None
            self._heed(phase, fault)
            self._count(phase, (), ())
            return []
        importance = self.parts.importance
        if phase.freeze is not None and importance is not None and self.freeze is None:
            self.freeze = ElementFreeze(
                importance.marks, importance.parameters, mode=phase.freeze.mode, snapshot=importance.start
            )
        optimizer = self.parts.optimizers[phase.optimizer]
        budget, reports = self.learner.micro_batch_tokens, []
        with self.ledger.timed(phase.name):
            updates = [updates[0], *(self._with_old_policy(u) for u in updates[1:])] if updates else []
            for update in updates:
                reports.append(self.learner.apply(update, optimizer, freeze=self.freeze, guard=self.guard))
                self.version += reports[-1].moved
                self._heed(phase, reports[-1].fault)
        if self.learner.micro_batch_tokens != budget:
            now = self.learner.micro_batch_tokens
            self.emit("events", {"event": "memory", "step": self.steps, "micro_batch_tokens": now, "before": budget})
        self._count(phase, updates, reports)
        return reports

    def record(self, phase: Phase, groups: Sequence[Group], reports: Sequence[UpdateReport]) -> None:
        """Metrics and samples of this turn; counts it."""
        if phase.prompts:
            self.steps += 1
        self.iterations += 1
        record: dict[str, Any] = {
            "iteration": self.iterations,
            "step": self.steps,
            "phase": phase.name,
            "elapsed": self.elapsed,
            "epoch": self.stream.epoch,
            "tokens_per_second": self._tokens_per_second(groups),
            **self.method.progress(),
            **group_metrics(groups),
            "updates": [update_record(report) for report in reports],
        }
        self.emit("metrics", record)
        self._write_samples(groups)
        self._watch_sampler(reports)
        every = self.config.evaluation.every_steps
        if every is not None and phase.prompts and self.steps % every == 0:
            self.evaluate(f"step {self.steps}")

    def save_if_due(self) -> None:
        """A checkpoint every `run.checkpoint_steps` turns of the loop."""
        every = self.config.run.checkpoint_steps
        if every is not None and self.iterations % every == 0:
            self.save()

    def finish(self) -> None:
        """Leave the last phase, measure, save."""
        if self.phase == "sft" and self.meters and "after" not in self.meters[-1]:
            self._leave_sft()
            self.phase = None
        score = self.evaluate("after")
        self.scores["after"] = None if score is None else score_record(score)
        self.save()

    # --- phases ----------------------------------------------------------------------------------------------------

    def _enter_sft(self, phase: Phase) -> None:
        self.ledger.intervals += 1
        before = self._meter()
        self.frozen = None
        if phase.freeze is not None and self.parts.importance is not None:
            with self.ledger.timed("freeze"):
                report = self.parts.importance.end_interval()
            self.frozen = freeze_record(report)
        entry: dict[str, Any] = {"interval": self.ledger.intervals, "step": self.steps, "before": before}
        self.meters.append(
            entry | {"frozen_fraction": (self.frozen or {}).get("frozen_fraction", 0.0), "demonstrations": 0}
        )

    def _leave_sft(self) -> None:
        if self.freeze is not None:
            with self.ledger.timed("freeze"):
                self.freeze.settle()
        self.frozen = self.freeze = None
        if self.meters and "after" not in self.meters[-1]:
            self.meters[-1]["after"] = self._meter()
            self.emit("events", {"event": "sft_phase", **self.meters[-1]})
        if self.parts.importance is not None:
            with self.ledger.timed("freeze"):
                self.parts.importance.begin_interval()

    def _meter(self) -> float | None:
        if not self.config.evaluation.around_sft:
            return None
        score = self.evaluate("forgetting meter", self.config.evaluation.meter_problems)
        return None if score is None else score.accuracy.value

    def evaluate(self, label: str, problems: int | None = None) -> Score | None:
        """Measure on held-out problems; None where the run has none."""
        if self.parts.evaluate is None:
            return None
        with self.ledger.timed("evaluation"):
            self.sync_engine()
            try:
                score = self.parts.evaluate(self.engine, self.parts.corpus.evaluation[:problems])
            except NumericsError:
                check_weights(self.learner.policy.model)  # says more, where they are the reason
                raise
        record = {"event": "evaluation", "label": label, "step": self.steps, "phase": self.phase, **score_record(score)}
        self.emit("events", record)
        return score

    # --- pieces of a step --------------------------------------------------------------------------------------------

    def sync_engine(self) -> None:
        """Give the engine the current weights unless it has them."""
        if self.engine.version != self.version:
            self.engine.update(self.learner.policy.model, self.version)

    def _sampling(self) -> Sampling:
        rollout = self.config.rollout
        return Sampling(
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            max_tokens=rollout.max_response_tokens,
            stop_ids=self.parts.chat.stop_ids,
        )

    def _grade(self, problems: Sequence[Problem], rollouts: Sequence[Sequence[Rollout]]) -> list[tuple[Verdict, ...]]:
        answers = [
            Answer(grader=problem.grader, gold=problem.answer, text=self.parts.chat.decode(rollout.token_ids))
            for problem, row in zip(problems, rollouts, strict=True)
            for rollout in row
        ]
        graded = self.parts.grader.grade(answers)
        self.failures.see(answers, graded)
        verdicts = iter(graded)
        return [tuple(next(verdicts) for _ in row) for row in rollouts]

    def _group(self, problem: Problem, rollouts: Sequence[Rollout], verdicts: Sequence[Verdict]) -> Group:
        reward = self.config.reward
        rewards = tuple(reward.correct if v is Verdict.CORRECT else reward.incorrect for v in verdicts)
        check_rewards(rewards, problem.id)
        encoded = self.parts.corpus.encoded[problem.id]
        return Group(
            problem=problem,
            prompt_ids=encoded.prompt_ids,
            rollouts=tuple(rollouts),
            verdicts=tuple(verdicts),
            rewards=rewards,
            demonstration_ids=encoded.demonstration_ids,
        )

    def _with_old_policy(self, update: Update) -> Update:
        """π_old of an update that comes after others of the same rollouts: the policy as it is now, before any of them."""
        if not any(term.uses_old_policy for term in update.terms):
            return update
        return replace(update, old_logprobs=tuple(self.learner.logprobs(update.sequences)))

    def _count(self, phase: Phase, updates: Sequence[Update], reports: Sequence[UpdateReport]) -> None:
        ledger = self.ledger
        ledger.updates += sum(r.taken for r in reports)
        tokens, fed = sum(r.tokens for r in reports), sum(r.fed_tokens for r in reports)
        if phase.name == "sft":
            ledger.sft_steps += 1
            ledger.sft_tokens, ledger.sft_fed_tokens = ledger.sft_tokens + tokens, ledger.sft_fed_tokens + fed
            taken = [update for update, report in zip(updates, reports, strict=True) if report.taken]
            ids = [s.problem_id for update in taken for s in update.sequences]
            ledger.used_demonstrations(ids)
            if self.meters and "after" not in self.meters[-1]:
                self.meters[-1]["demonstrations"] += len(ids)
        else:
            ledger.rl_steps += 1
            ledger.rl_tokens, ledger.rl_fed_tokens = ledger.rl_tokens + tokens, ledger.rl_fed_tokens + fed

    def _tokens_per_second(self, groups: Sequence[Group]) -> float | None:
        """Response tokens sampled in this turn over its wall time, training included."""
        now = time.perf_counter()
        seconds, self.turn_started = now - self.turn_started, now
        tokens = sum(len(r.token_ids) for group in groups for r in group.rollouts)
        return tokens / seconds if tokens else None

    def _write_samples(self, groups: Sequence[Group]) -> None:
        shown = [(g, i) for g in groups for i in range(len(g.rollouts))]
        wanted = self.config.run.samples_per_step
        stride = max(1, len(shown) // wanted) if wanted else len(shown) + 1
        for group, i in shown[::stride][:wanted]:
            rollout = group.rollouts[i]
            self.emit(
                "samples",
                {
                    "step": self.steps,
                    "problem": group.problem.id,
                    "prompt": group.problem.messages[-1].content,
                    "response": self.parts.chat.decode(rollout.token_ids),
                    "answer": group.problem.answer,
                    "verdict": group.verdicts[i].value,
                    "tokens": len(rollout.token_ids),
                    "stop": rollout.stop,
                },
            )

    def _watch_sampler(self, reports: Sequence[UpdateReport]) -> None:
        alarm = gap_alarm(reports)
        if alarm is not None:
            self.emit("events", {"event": "alarm", "step": self.steps, "alarm": "sampler_gap", **alarm})

    def _heed(self, phase: Phase, fault: Fault | None) -> None:
        """Write down what is wrong with an update, and stop where too many were."""
        if fault is not None:
            self.emit("events", {"event": "fault", "step": self.steps, "phase": phase.name, **fault.record()})
        self.guard.count(fault)

    def emit(self, stream: str, record: Mapping[str, Any]) -> None:
        """Write a record to the run folder and show it."""
        self.journal.write(stream, record)
        self.parts.listener(stream, record)

    # --- state -------------------------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write a checkpoint of everything.

        Raises:
            NumericsError: weights or moments are not finite; the checkpoints there are stay as they are.
        """
        check_state(self.learner.policy.model, self.parts.optimizers, "a checkpoint would hold weights or moments")
        with self.ledger.timed("checkpoint"):
            run = self.config.run
            save_checkpoint(
                self.parts.folder / "checkpoints", self.iterations, self.snapshot(), keep=run.keep_checkpoints
            )
        self.emit("events", {"event": "checkpoint", "step": self.steps, "iteration": self.iterations})

    def snapshot(self) -> Snapshot:
        """All state, by component."""
        if self.freeze is not None:
            self.freeze.settle()
        names = {parameter: name for name, parameter in self.learner.policy.model.named_parameters()}
        tensors: dict[str, Mapping[str, Any]] = {"model": {names[p]: p for p in self.learner.parameters}}
        for name, optimizer in self.parts.optimizers.items():
            tensors[name] = optimizer.state_tensors()
        if self.parts.importance is not None:
            state = self.parts.importance.state_dict()
            tensors["importance"] = {f"{key}.{i}": t for key, rows in state.items() for i, t in enumerate(rows)}
        if self.guard.good.held:
            tensors["rollback"] = self.guard.good.state_tensors()
        own = ("steps", "iterations", "version", "phase", "meters", "scores", "frozen")
        return Snapshot(
            tensors,
            {name: getattr(self, name) for name in own}
            | {
                "elapsed": self.elapsed,
                "verdicts": dict(self.grader_counts),
                "stream": self.stream.state_dict(),
                "method": self.method.state_dict(),
                "ledger": self.ledger.state_dict(),
                "journal": self.journal.state_dict(),
                "optimizers": {name: o.state_dict() for name, o in self.parts.optimizers.items()},
                "data": self.parts.corpus.fingerprint,
                "guard": self.guard.state_dict(),
                "micro_batch_tokens": self.learner.micro_batch_tokens,
                "sampler_watch": watch.state_dict() if (watch := self.learner.sampler_watch) is not None else None,
            },
        )

    def restore(self, snapshot: Snapshot) -> None:
        """Continue from a snapshot, in the same bits."""
        state = snapshot.state
        if state["data"] != self.parts.corpus.fingerprint:
            raise CheckpointError(
                f"data.train = '{self.config.data.train}' or data.evaluation = '{self.config.data.evaluation}' holds other "
                f"problems than when {self.parts.folder} was started. Put the files back as they were, or start another run."
            )
        _copy_parameters(self.learner.policy.model, snapshot.tensors["model"])
        for name, optimizer in self.parts.optimizers.items():
            optimizer.load(state["optimizers"][name], snapshot.tensors.get(name, {}))
        if self.parts.importance is not None:
            rows: dict[str, list[Any]] = {"importance": [], "start": [], "frozen_zeros": []}
            stored = snapshot.tensors["importance"]
            for key in sorted(stored, key=lambda k: (k.split(".")[0], int(k.split(".")[1]))):
                rows[key.split(".")[0]].append(stored[key])
            self.parts.importance.load_state_dict(rows)
        for name in ("steps", "iterations", "version", "phase", "meters", "scores", "frozen"):
            setattr(self, name, state[name])
        self.elapsed_before = state["elapsed"]
        self.verdicts_before = state["verdicts"]
        self.stream.load_state_dict(state["stream"])
        self.method.load_state_dict(state["method"])
        self.ledger.load_state_dict(state["ledger"])
        self.journal.load_state_dict(state["journal"])
        self.guard.load_state_dict(state["guard"], snapshot.tensors.get("rollback", {}))
        self.learner.micro_batch_tokens = state["micro_batch_tokens"]
        if self.learner.sampler_watch is not None:
            self.learner.sampler_watch.load_state_dict(state["sampler_watch"])
        check_state(self.learner.policy.model, self.parts.optimizers, "the checkpoint holds weights or moments")


def _copy_parameters(model: nn.Module, stored: Mapping[str, Any]) -> None:
    missing, unexpected = model.load_state_dict(dict(stored), strict=False)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not unexpected, unexpected
    assert not trainable & set(missing), missing


def derive_seed(seed: int, purpose: str, step: int) -> int:
    """A seed for one purpose at one step; the same on every platform, so a resumed run needs no generator state."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return int.from_bytes(digest[:7], "big")
