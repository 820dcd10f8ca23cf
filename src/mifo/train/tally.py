"""What one update adds up to, and what is reported of it.

Legend: T response tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mifo.train.faults import Fault, Sample
from mifo.train.parallel import World
from mifo.train.rows import live_sequences
from mifo.types import Taken, Update


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """What one optimizer step did; every figure is over the whole update.

    `taken` is False where the step was skipped (`fault` says why). `entropy`, `clip_fraction` and `sampler_gap` are None where
    nothing was measured: no sequence was fed, because nothing could be learned from any. The gap is that of the rollouts to
    π_old; where few of them were fed, some others were scored for it. `sampler_gap_limit` is what it was judged by, None
    where it was not.
    """

    loss: float
    losses: dict[str, float]
    grad_norm: float
    learning_rate: float
    sequences: int
    trained_sequences: int
    tokens: int
    fed_tokens: int
    entropy: float | None
    clip_fraction: float | None
    sampler_gap: float | None
    sampler_gap_limit: float | None = None
    micro_batch_tokens: int
    taken: bool = True
    fault: Fault | None = None

    @property
    def measured(self) -> Taken:
        """What a method hears of it."""
        return Taken(grad_norm=self.grad_norm, losses=self.losses)

    @property
    def moved(self) -> bool:
        """Whether the weights are others than before: a step, or a step undone."""
        return self.taken or (self.fault is not None and self.fault.action == "rollback")


@dataclass(slots=True)
class Tally:
    """Sums over the micro-batches of an update. `faults` counts `samples` on all ranks."""

    losses: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    fed: int = 0
    entropy: float = 0.0
    entropy_tokens: int = 0
    clipped: float = 0.0
    gap: float = 0.0
    gap_tokens: int = 0
    faults: int = 0
    samples: list[Sample] = field(default_factory=list)

    def add_entropy(self, entropy_T: Tensor) -> None:
        """Entropies of tokens whose distribution was computed."""
        self.entropy += float(entropy_T.sum())
        self.entropy_tokens += len(entropy_T)

    def add_gap(self, sampled_T: Tensor, trainer_T: Tensor) -> None:
        """Log-probs of the same tokens by sampler and trainer."""
        self.gap += float((sampled_T - trainer_T).abs().sum())
        self.gap_tokens += len(sampled_T)

    def blame(self, samples: SequenceOf[Sample]) -> None:
        """Sequences with numbers that are not finite."""
        self.samples += samples
        self.faults += len(samples)

    def over_ranks(self, world: World) -> None:
        """Add up over all ranks, so that all of them decide alike and report the whole update; `samples` stay this rank's."""
        names = ("tokens", "fed", "entropy", "entropy_tokens", "clipped", "gap", "gap_tokens", "faults")
        own = [*self.losses.values(), *(getattr(self, name) for name in names)]
        sums = world.all_sum(torch.tensor(own, dtype=torch.float64)).tolist()
        for term in self.losses:
            self.losses[term] = sums.pop(0)
        for name, value in zip(names, sums, strict=True):
            setattr(self, name, type(getattr(self, name))(value))

    @property
    def loss(self) -> float:
        """Of all terms."""
        return sum(self.losses.values())

    @property
    def mean_gap(self) -> float | None:
        """Mean |Δ log-prob| between sampler and trainer in nats; None where no rollout was scored."""
        return self.gap / self.gap_tokens if self.gap_tokens else None

    def report(
        self,
        update: Update,
        *,
        grad_norm: float,
        learning_rate: float,
        sampler_gap_limit: float | None,
        micro_batch_tokens: int,
        taken: bool,
        fault: Fault | None,
    ) -> UpdateReport:
        """What is reported of the update whose sums these are, with what the optimizer did about it."""
        return UpdateReport(
            loss=self.loss,
            losses=self.losses,
            grad_norm=grad_norm,
            learning_rate=learning_rate,
            sequences=len(update.sequences),
            trained_sequences=len(live_sequences(update)),
            tokens=self.tokens,
            fed_tokens=self.fed,
            entropy=self.entropy / self.entropy_tokens if self.entropy_tokens else None,
            clip_fraction=self.clipped / self.tokens if self.tokens else None,
            sampler_gap=self.mean_gap,
            sampler_gap_limit=sampler_gap_limit,
            micro_batch_tokens=micro_batch_tokens,
            taken=taken,
            fault=fault,
        )
