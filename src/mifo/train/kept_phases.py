"""The weights where each phase of a run ends, kept for measurements: RUN/phases/step-NNNNNN, `run.keep_phases`.

They are committed as checkpoints are, hold no optimizer and cannot be resumed from. Where MIFO freezes, the mask of the SFT phase
that begins there is kept beside them, one byte an element.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from mifo.train.checkpoint import STATE, Checkpoints, Retention, Snapshot, list_checkpoints, read_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mifo.train.run import Run

FOLDER, MASK, START = "phases", "mask", "start"


def keep_phase(run: Run, ended: str | None = None) -> None:
    """Keep the weights where a phase ends or the run begins, if the [run] table asks for it; nothing where that was done.

    Args:
        run: as it stands there.
        ended: what ended; the run's phase where it is None.

    Raises:
        CheckpointError: they could not be written.
    """
    if not run.config.run.keep_phases:
        return
    folder = run.parts.folder / FOLDER
    if any(_same_place(path, run) for path in list_checkpoints(folder)):
        return  # a run that goes on from before it makes the same again
    names = {parameter: name for name, parameter in run.learner.policy.model.named_parameters()}
    tensors: dict[str, Mapping[str, Tensor]] = {"model": {names[p]: p for p in run.learner.parameters}}
    if run.frozen is not None and run.importance is not None:
        tensors[MASK] = {names[p]: run.importance.mask(i) for i, p in enumerate(run.importance.parameters)}
    ended = ended or (START if run.iterations == 0 else run.phase or f"stage {run.stage}")
    state = {"phase": ended, "step": run.steps, "iteration": run.iterations, "version": run.version}
    keeps_all = Retention(newest=1, every=1)
    checkpoints = run.parts.checkpoints
    Checkpoints(
        folder, retention=keeps_all, code=checkpoints.code, settings=checkpoints.settings, storage=run.parts.storage
    ).save(run.iterations, Snapshot(tensors, state))


def _same_place(path: Path, run: Run) -> bool:
    """A rejuvenation makes new weights between the same turns of the loop, in a folder of their own: step-NNNNNN.1."""
    if path.name.partition(".")[0] != f"step-{run.iterations:06d}":
        return False
    return bool(read_json(path / STATE).get("version", run.version) == run.version)


def kept_phases(run: Path) -> list[Path]:
    """The kept weights of a run, in their order; [] where it keeps none."""
    return list_checkpoints(run / FOLDER)
