"""The two bugs of the corrected-baseline paper (S2 §2), as exhibits: what the engine makes impossible, done on purpose.

An update of B sequences is cut, in order, into W ranks of G micro-batches each; S_kj and n_kj are the sum of token losses and the
tokens of micro-batch j of rank k, and N = Σ n_kj.

    correct                 Σ_kj S_kj / N
    dropped "first_last"    the loss is computed, but only the gradients of j = 0 and j = G − 1 reach the optimizer: what the code
                            of DeepSpeed's offloaded optimizer does; with G = 2 nothing is lost
    dropped "first"         only j = 0: what the paper's §2.1 says it does
    means "micro_batch"     1/(W·G) Σ_kj S_kj / n_kj
    means "rank"            1/W Σ_k (Σ_j S_kj) / (Σ_j n_kj)

The learner is the engine's, with these scales in place of `core.reduce`'s, and a part of the gradient thrown away; a gradient is
a sum, so how its passes are cut does not matter. Forward, backward, terms, clipping and the step are untouched. What it reports
as its loss is what such a code would log. It is made by `lab.bug_run` alone: no recipe, setting, method or variable of the
environment leads to it, which a test holds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any, Literal

from mifo.errors import ConfigError
from mifo.train.learner import Learner, Scales, Visit
from mifo.train.rows import counted_tokens
from mifo.types import Update

Dropped = Literal["first_last", "first"]
Means = Literal["micro_batch", "rank"]
DROPPED: tuple[Dropped, ...] = ("first_last", "first")
MEANS: tuple[Means, ...] = ("micro_batch", "rank")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bug:
    """Which of the two defects, on how many simulated ranks with how many micro-batches each; neither is a correct reduction."""

    dropped: Dropped | None = None
    means: Means | None = None
    ranks: int = 1
    micro_batches: int = 4

    def cut(self, sequences: int) -> list[list[int]]:
        """The sequences of each micro-batch, rank after rank, as equal in number as can be.

        Raises:
            ConfigError: there would be micro-batches without a sequence.
        """
        pieces = self.ranks * self.micro_batches
        if sequences < pieces:
            raise ConfigError(
                f"--ranks {self.ranks} --micro-batches {self.micro_batches}: {pieces} micro-batches need as many sequences, and "
                f"an update has {sequences}. Lower one of the two, or raise --batch-size."
            )
        found: list[list[int]] = [[] for _ in range(pieces)]
        for index in range(sequences):
            found[index * pieces // sequences].append(index)
        return found

    def survives(self, piece: int) -> bool:
        """The gradient of this micro-batch reaches the optimizer."""
        kept = {"first_last": (0, self.micro_batches - 1), "first": (0,)}
        return self.dropped is None or piece % self.micro_batches in kept[self.dropped]

    def scales(self, counted: SequenceOf[int]) -> list[float]:
        """The factor of each sequence's summed token losses under a mean of means.

        Args:
            counted: tokens of each sequence of the update.
        """
        pieces = self.cut(len(counted))
        if self.means == "rank":
            own = self.micro_batches
            pieces = [[i for piece in pieces[k : k + own] for i in piece] for k in range(0, len(pieces), own)]
        scales = [0.0] * len(counted)
        for piece in pieces:
            tokens = sum(counted[i] for i in piece)
            for i in piece:
                scales[i] = 1.0 / (len(pieces) * tokens) if counted[i] else 0.0
        return scales


class FaultyLearner(Learner):
    """The engine's learner with a faulty reduction.

    Args:
        bug: what is wrong with it; the others are those of `Learner`.
    """

    def __init__(self, *arguments: Any, bug: Bug, **named: Any) -> None:
        super().__init__(*arguments, **named)
        assert self.world.size == 1, "ranks are simulated"
        self.bug = bug

    def _scales(self, update: Update) -> Scales:
        """Means of means where these are the bug."""
        if self.bug.means is None:
            return super()._scales(update)
        assert all(term.normalizer == "token" and term.published is None for term in update.terms)
        return {
            term.name: self.bug.scales([counted_tokens(term, s) for s in update.sequences]) for term in update.terms
        }

    def _each_micro_batch(self, update: Update, live: SequenceOf[int], visit: Visit) -> None:
        """The micro-batches whose gradient survives; then the others, whose gradient is computed, and lost."""
        pieces = self.bug.cut(len(update.sequences))
        kept = {i for number, piece in enumerate(pieces) if self.bug.survives(number) for i in piece}
        super()._each_micro_batch(update, [i for i in live if i in kept], visit)
        if any(i not in kept for i in live):
            with self._lost():
                super()._each_micro_batch(update, [i for i in live if i not in kept], visit)

    @contextlib.contextmanager
    def _lost(self) -> Iterator[None]:
        """What is added to the gradient within is forgotten."""
        held = [parameter.grad for parameter in self.trained]
        self._clear()
        yield
        for parameter, gradient in zip(self.trained, held, strict=True):
            parameter.grad = gradient
