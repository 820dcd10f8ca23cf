"""What is wrong with an update whose numbers are not finite, and whose fault it is.

The detectors cost nothing: the losses are read anyway, and so is the gradient's norm, which reads every gradient. Only when one
of them is not finite does anybody look for the samples, or the weights, behind it.

A finite norm also proves that AdamW's moments stay finite: every |g| is then below the root of the largest fp32 number, so
g² and its running mean do not overflow.

Legend: T response tokens of a micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mifo.errors import NumericsError
from mifo.train.optim import ScheduledAdamW
from mifo.types import Group, Problem, TokenStats
from mifo.types import Sequence as TrainingSequence

NAMED_IN_RECORD = 32  # samples that an event lists; it counts all of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One sequence with a number that is not finite; `rollout` is None for a demonstration."""

    problem_id: str
    rollout: int | None
    what: str

    def __str__(self) -> str:
        part = "demonstration" if self.rollout is None else f"rollout {self.rollout}"
        return f"{self.what} of problem {self.problem_id}, {part}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Why an update was not taken, or was taken with a warning.

    `kind` is "not finite", "spike" or "norm" (above a published code's limit); `action` says what was done about it: "skip",
    "rollback" or "warn".
    """

    kind: Literal["not finite", "spike", "norm"]
    reason: str
    action: Literal["skip", "rollback", "warn"] = "skip"
    samples: tuple[Sample, ...] = ()

    def record(self) -> dict[str, Any]:
        """As plain data for events.jsonl."""
        named = [{"problem": s.problem_id, "rollout": s.rollout, "what": s.what} for s in self.samples]
        return {
            "fault": self.kind,
            "action": self.action,
            "reason": self.reason,
            "sample_count": len(named),
            "samples": named[:NAMED_IN_RECORD],
        }


def sample_of(sequence: TrainingSequence, what: str) -> Sample:
    """A sequence as an event names it."""
    return Sample(problem_id=sequence.problem_id, rollout=sequence.rollout, what=what)


def seen_rows(stats: TokenStats, quantity: str) -> dict[str, Tensor | None]:
    """What every term of an update looks at, by the name that an event gives it, causes before effects: the rows of `blame`.

    Args:
        stats: of a micro-batch.
        quantity: what the policy's head yields in the place of log-probs.
    """
    return {
        quantity: stats.logp_T.detach(),
        "entropy": stats.entropy_T.detach(),
        f"old {quantity}": stats.old_logp_T,
        "reference log-prob": stats.ref_logp_T,
        "sampler log-prob": stats.sampler_logp_T,
        "target": stats.target_T,
        "vocabulary statistic": None if stats.vocabulary_T is None else stats.vocabulary_T.detach(),
    }


def blame(rows: Mapping[str, Tensor | None], sequence_T: Tensor, sequences: Sequence[TrainingSequence]) -> list[Sample]:
    """The sequences of a micro-batch that hold a value that is not finite, each with the first of `rows` that does.

    Args:
        rows: what to look at, by name, causes before effects; each [T] or None.
        sequence_T: which of `sequences` a row belongs to.
        sequences: those of the micro-batch, in its order.
    """
    causes: dict[int, str] = {}
    for what, row_T in rows.items():
        if row_T is not None:
            for index in sequence_T[~torch.isfinite(row_T)].unique().tolist():
                causes.setdefault(index, what)
    return [sample_of(sequences[index], what) for index, what in sorted(causes.items())]


def bad_rewards(groups: Iterable[Group]) -> Fault | None:
    """Rewards that are NaN or infinite, each with its problem and rollout; None where all are finite."""
    samples = tuple(
        Sample(problem_id=group.problem.id, rollout=index, what="reward")
        for group in groups
        for index, reward in enumerate(group.rewards)
        if not math.isfinite(reward)
    )
    return (
        Fault(kind="not finite", reason=f"{len(samples)} rewards are not finite", samples=samples) if samples else None
    )


def bad_rollouts(error: NumericsError, problems: Sequence[Problem]) -> Fault:
    """What a rollout engine found, by the names of the problems that it was given."""
    samples = [Sample(problem_id=problems[p].id, rollout=r, what="rollout log-prob") for p, r in error.rollouts]
    return Fault(kind="not finite", reason=str(error), samples=tuple(samples))


def bad_tensors(named: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Names of the tensors that hold NaN or infinity; reads each of them once (`isfinite().all()` takes six times as long)."""
    return [
        name
        for name, tensor in named
        if tensor.is_floating_point()
        and tensor.numel()
        and not bool(torch.isfinite(torch.stack(tensor.aminmax())).all())
    ]


def check_weights(model: nn.Module) -> None:
    """Refuse weights that are not finite: no step can mend them.

    Raises:
        NumericsError: names the parameters and the remedy.
    """
    _refuse(bad_tensors(model.named_parameters()), "weights")


def check_state(
    model: nn.Module, optimizers: Mapping[str, ScheduledAdamW], what: str, others: Mapping[str, Tensor] | None = None
) -> None:
    """Refuse weights and moments, and other tensors by name, that are not finite, when a checkpoint is written or read.

    Raises:
        NumericsError: names the parameters; `what` begins its message.
    """
    named: list[tuple[str, Tensor]] = [*model.named_parameters(), *(others or {}).items()]
    names = {parameter: name for name, parameter in model.named_parameters()}
    for key, optimizer in optimizers.items():
        for name, tensor in optimizer.state_tensors().items():
            index, part = name.split(".", 1)
            parameter = optimizer.parameters[int(index)]
            named.append((f"{part} of {names[parameter]} in {key}_optimizer", tensor))
    _refuse(bad_tensors(named), what)


def _refuse(names: Sequence[str], what: str) -> None:
    if not names:
        return
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    raise NumericsError(
        f"{what} that are NaN or infinite: {shown}. No step can mend them. If the model was just loaded, its files are "
        "damaged or not meant for fp32; if it was training, resume from an earlier checkpoint with a lower learning rate."
    )
