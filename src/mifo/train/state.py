"""What must survive a crash: all state of a run as named tensors and plain data, and the way back.

Everything random is a function of (seed, step), so there is no generator state to keep.

A turn of the loop changes plain state as it goes and tensors only at its optimizer steps and at changes of phase. A stop in its
middle therefore saves the tensors as they are with the plain state of the last `mark`: the last moment before which everything
was done and after which nothing was, but for what `Turn` holds.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mifo.errors import CheckpointError
from mifo.train.checkpoint import Checkpoints, Snapshot
from mifo.train.faults import check_state
from mifo.train.phases import attach_adapters, set_up_stage
from mifo.train.reference import load_reference, reference_tensors
from mifo.train.turn import load_turn
from mifo.train.writer import CheckpointWriter
from mifo.types import LowRank

if TYPE_CHECKING:
    from mifo.train.run import Run

OWN = (
    "steps", "iterations", "version", "phase", "meters", "scores", "frozen", "evaluated", "evaluated_flops", "finished_at",
    "stage", "stage_began", "sft_phases", "rejuvenations",
)  # fmt: skip


class Saving:
    """What the next checkpoint will hold, whether it is saved already, and the writer.

    Args:
        checkpoints: where to.
        background: write beside training.
    """

    def __init__(self, checkpoints: Checkpoints, *, background: bool) -> None:
        self.writer = CheckpointWriter(checkpoints, background=background)
        self.marked: Mapping[str, Any] = {}
        self._saved: Mapping[str, Any] | None = None

    def mark(self, plain: Mapping[str, Any]) -> None:
        """`plain` is the state of the next checkpoint."""
        self.marked = plain

    @property
    def up_to_date(self) -> bool:
        """The last mark is in a checkpoint, written or in flight."""
        return self._saved is self.marked

    def save(self, take: Callable[[], Snapshot]) -> None:
        """Save what `take` gives; raises what this write or the last one raised."""
        self.writer.save(self.marked["iterations"], take())
        self._saved = self.marked


def plain_state(run: Run) -> dict[str, Any]:
    """Everything but tensors, optimizers and the turn under way; shares nothing that changes later."""
    return {name: copy.deepcopy(getattr(run, name)) for name in OWN} | {
        "elapsed": run.elapsed,
        "verdicts": dict(run.grader_counts),
        "stream": run.stream.state_dict(),
        "method": run.method.state_dict() if run.turn is None else run.turn.method,
        "ledger": run.ledger.state_dict(),
        "journal": run.journal.state_dict(),
        "data": run.parts.corpus.fingerprint,
        "reference": run.parts.reference_hash,
        "reference_name": run.learner.reference_name,
        "guard": run.guard.state_dict(),
        "failures": run.failures.state_dict(),
        "micro_batch_tokens": run.learner.micro_batch_tokens,
        "sampler_watch": watch.state_dict() if (watch := run.learner.sampler_watch) is not None else None,
        "scorer": scorer.state_dict() if (scorer := run.parts.scorer) is not None else None,
    }


def take_snapshot(run: Run, plain: Mapping[str, Any]) -> Snapshot:
    """All state of a run, by component; the tensors are the live ones.

    Args:
        run: between two optimizer steps.
        plain: what `plain_state` gave at the last mark.
    """
    if run.freeze is not None:
        run.freeze.settle()
    names = {parameter: name for name, parameter in run.learner.policy.model.named_parameters()}
    tensors: dict[str, Mapping[str, Any]] = {"model": {names[p]: p for p in run.learner.parameters}}
    for name, optimizer in run.parts.optimizers.items():
        tensors[name] = optimizer.state_tensors()
    if run.importance is not None:
        state = run.importance.state_dict()
        tensors["importance"] = {f"{key}.{i}": t for key, rows in state.items() for i, t in enumerate(rows)}
    tensors |= reference_tensors(run.learner)
    adapters = run.learner.adapters
    if adapters is not None:
        tensors["adapters"] = adapters.state_tensors()
    if run.guard.good.held:
        tensors["rollback"] = run.guard.good.state_tensors()
    optimizers = dict(run.parts.optimizers)
    if run.parts.scorer is not None:
        tensors |= run.parts.scorer.tensors()
        optimizers[run.parts.scorer.name] = run.parts.scorer.optimizer
    if run.turn is not None:
        tensors["turn"] = run.turn.tensors()
    return Snapshot(
        tensors,
        {
            **plain,
            "optimizers": {name: o.state_dict() for name, o in optimizers.items()},
            "adapters": None if adapters is None else {"optimizer": run.adapted, "state": adapters.state_dict()},
            "turn": None if run.turn is None else run.turn.state_dict(),
        },
    )


def restore_snapshot(run: Run, snapshot: Snapshot) -> dict[str, int]:
    """Continue from a snapshot, in the same bits. The snapshot's tensors are copied.

    Returns:
        Bytes of the logs that are no longer there (see `Journal.load_state_dict`).

    Raises:
        CheckpointError: the data, or the reference model, are not those the run was started on, or the snapshot lacks a part.
    """
    state = snapshot.state
    _refuse_other_inputs(run, state)
    for name in OWN:
        setattr(run, name, state[name])
    if run.stage > 0:
        set_up_stage(run)
    copy_parameters(run.learner.policy.model, snapshot.tensors["model"])
    load_reference(run.learner, state["reference_name"], snapshot.tensors)
    for name, optimizer in run.parts.optimizers.items():
        optimizer.load(state["optimizers"][name], cloned(snapshot.tensors.get(name, {})))
    if run.importance is not None:
        rows: dict[str, list[Any]] = {"importance": [], "start": [], "frozen_zeros": []}
        stored = snapshot.tensors["importance"]
        for key in sorted(stored, key=lambda k: (k.split(".")[0], int(k.split(".")[1]))):
            rows[key.split(".")[0]].append(stored[key])
        run.importance.load_state_dict(rows)
    run.elapsed_before = state["elapsed"]
    run.verdicts_before = state["verdicts"]
    run.stream.load_state_dict(state["stream"])
    run.method.load_state_dict(state["method"])
    run.ledger.load_state_dict(state["ledger"])
    run.guard.load_state_dict(state["guard"], cloned(snapshot.tensors.get("rollback", {})))
    run.failures.load_state_dict(state["failures"])
    run.learner.micro_batch_tokens = state["micro_batch_tokens"]
    if run.learner.sampler_watch is not None:
        run.learner.sampler_watch.load_state_dict(state["sampler_watch"])
    others = _restore_adapters(run, state["adapters"], snapshot.tensors.get("adapters", {}))
    check_state(run.learner.policy.model, run.parts.optimizers, "the checkpoint holds weights or moments", others)
    if (scorer := run.parts.scorer) is not None:
        scorer.load(state["scorer"], state["optimizers"][scorer.name], snapshot.tensors)
        scorer.check("the checkpoint holds weights or moments")
    if state["turn"] is not None:
        problems = {p.id: p for p in run.parts.corpus.train}
        run.turn = load_turn(
            state["turn"],
            snapshot.tensors["turn"],
            state["method"],
            lambda name, *rest: run.make_group(problems[name], *rest),
        )
    return run.journal.load_state_dict(state["journal"])


def _refuse_other_inputs(run: Run, state: Mapping[str, Any]) -> None:
    """The checkpoint must be of this version's making, of the same data and of the same reference."""
    data = run.config.data
    if missing := sorted(plain_state(run).keys() - state.keys()):
        raise CheckpointError(
            f"the checkpoint in {run.parts.folder} says nothing of {', '.join(missing)}: another version of mifo wrote it. "
            "Resume with that version (its MANIFEST.json names it), or start another run."
        )
    if state["data"] != run.parts.corpus.fingerprint:
        raise CheckpointError(
            f"data.train = '{data.train}' or data.evaluation = '{data.evaluation}' holds other problems than when "
            f"{run.parts.folder} was started. Put the files back as they were, or start another run."
        )
    if state["reference"] != run.parts.reference_hash:
        raise CheckpointError(
            f"model.path = '{run.config.model.path}' holds other weights than when {run.parts.folder} was started, and a KL "
            "term compares with them, or a rejuvenation goes back to them. Put the model back as it was, or start another run."
        )


def _restore_adapters(run: Run, stored: Mapping[str, Any] | None, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapters of the SFT phase under way, where it trains some; their tensors by name."""
    if stored is None:
        return {}
    shape = LowRank(rank=stored["state"]["rank"], alpha=stored["state"]["alpha"])
    adapters = attach_adapters(run, shape, stored["optimizer"])
    adapters.load(stored["state"], tensors)
    return adapters.named_tensors()


def cloned(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in memory of their own, under the same names."""
    return {name: tensor.clone() for name, tensor in tensors.items()}


def copy_parameters(model: nn.Module, stored: Mapping[str, Any]) -> None:
    """Give a model the stored values of all its trainable parameters."""
    missing, unexpected = model.load_state_dict(dict(stored), strict=False)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not unexpected, unexpected
    assert not trainable & set(missing), missing
