"""What must survive a crash: all state of a run as named tensors and plain data, and the way back.

Everything random is a function of (seed, step), so there is no generator state to keep.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from mifo.errors import CheckpointError
from mifo.train.checkpoint import Snapshot

if TYPE_CHECKING:
    from mifo.train.run import Run

OWN = ("steps", "iterations", "version", "phase", "meters", "scores", "frozen")


def take_snapshot(run: Run) -> Snapshot:
    """All state of a run, by component; the tensors are the live ones."""
    if run.freeze is not None:
        run.freeze.settle()
    names = {parameter: name for name, parameter in run.learner.policy.model.named_parameters()}
    tensors: dict[str, Mapping[str, Any]] = {"model": {names[p]: p for p in run.learner.parameters}}
    for name, optimizer in run.parts.optimizers.items():
        tensors[name] = optimizer.state_tensors()
    if run.parts.importance is not None:
        state = run.parts.importance.state_dict()
        tensors["importance"] = {f"{key}.{i}": t for key, rows in state.items() for i, t in enumerate(rows)}
    return Snapshot(
        tensors,
        {name: getattr(run, name) for name in OWN}
        | {
            "elapsed": run.elapsed,
            "verdicts": dict(run.grader_counts),
            "stream": run.stream.state_dict(),
            "method": run.method.state_dict(),
            "ledger": run.ledger.state_dict(),
            "journal": run.journal.state_dict(),
            "optimizers": {name: o.state_dict() for name, o in run.parts.optimizers.items()},
            "data": run.parts.corpus.fingerprint,
        },
    )


def restore_snapshot(run: Run, snapshot: Snapshot) -> None:
    """Continue from a snapshot, in the same bits.

    Raises:
        CheckpointError: the data are not those the run was started on.
    """
    state, data = snapshot.state, run.config.data
    if state["data"] != run.parts.corpus.fingerprint:
        raise CheckpointError(
            f"data.train = '{data.train}' or data.evaluation = '{data.evaluation}' holds other problems than when "
            f"{run.parts.folder} was started. Put the files back as they were, or start another run."
        )
    _copy_parameters(run.learner.policy.model, snapshot.tensors["model"])
    for name, optimizer in run.parts.optimizers.items():
        optimizer.load(state["optimizers"][name], snapshot.tensors.get(name, {}))
    if run.parts.importance is not None:
        rows: dict[str, list[Any]] = {"importance": [], "start": [], "frozen_zeros": []}
        stored = snapshot.tensors["importance"]
        for key in sorted(stored, key=lambda k: (k.split(".")[0], int(k.split(".")[1]))):
            rows[key.split(".")[0]].append(stored[key])
        run.parts.importance.load_state_dict(rows)
    for name in OWN:
        setattr(run, name, state[name])
    run.elapsed_before = state["elapsed"]
    run.verdicts_before = state["verdicts"]
    run.stream.load_state_dict(state["stream"])
    run.method.load_state_dict(state["method"])
    run.ledger.load_state_dict(state["ledger"])
    run.journal.load_state_dict(state["journal"])


def _copy_parameters(model: nn.Module, stored: Mapping[str, Any]) -> None:
    missing, unexpected = model.load_state_dict(dict(stored), strict=False)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert not unexpected, unexpected
    assert not trainable & set(missing), missing
