"""One optimizer step from one update: forward, backward, reduce, mask, clip, step, freeze (DESIGN 3).

    N_s ← counts of stream s over the whole update, all ranks          core.reduce, the only division
    for each micro-batch:  Σ_s c_s Σ_t scale_t f_t  .backward()
    g ← Σ_ranks g;   g ← (1 − M) ⊙ g;   clip ‖g‖;   step;   put masked elements back

Legend: T response tokens of a micro-batch, S sequences of the update.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mifo.core.freeze import ElementFreeze
from mifo.core.losses import PolicyGradient
from mifo.core.reduce import sequence_scale, update_totals, weighted_sum
from mifo.core.select import kept_count, top_entropy_tokens
from mifo.data.pack import MicroBatch, pack, plan_micro_batches
from mifo.errors import NumericsError
from mifo.train.optim import ScheduledAdamW
from mifo.train.parallel import World
from mifo.train.policy import Policy
from mifo.types import Sequence, Term, TokenStats, Update


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateReport:
    """What one optimizer step did; every figure is over the whole update."""

    loss: float
    losses: dict[str, float]
    grad_norm: float
    learning_rate: float
    sequences: int
    trained_sequences: int
    tokens: int
    fed_tokens: int
    entropy: float
    clip_fraction: float
    sampler_gap: float | None


@dataclass(slots=True)
class _Tally:
    """Sums over micro-batches, for the report."""

    losses: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    fed: int = 0
    entropy: float = 0.0
    clipped: float = 0.0
    gap: float = 0.0
    gap_tokens: int = 0


class Learner:
    """Turns updates into optimizer steps on a policy.

    Args:
        policy: what is trained.
        micro_batch_tokens: most tokens in one forward pass; results do not depend on it.
        world: the ranks.
        reference: the frozen policy of KL terms, or None.
        window: where an update may be broken off (see `Stop.window`): while its gradient is computed.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        micro_batch_tokens: int,
        world: World | None = None,
        reference: Policy | None = None,
        window: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.policy = policy
        self.micro_batch_tokens = micro_batch_tokens
        self.world = world or World()
        self.reference = reference
        self.window = window
        self.parameters = policy.parameters

    def apply(self, update: Update, optimizer: ScheduledAdamW, *, freeze: ElementFreeze | None = None) -> UpdateReport:
        """Take one optimizer step.

        Raises:
            NumericsError: the gradient is not finite; parameters and moments are untouched.
        """
        rate = optimizer.prepare()
        with self.window():
            tally = self.accumulate(update)
        if freeze is not None:
            freeze.mask_gradients()
        norm = self._clip(optimizer.config.clip_norm)
        if not math.isfinite(norm):
            self._clear()
            raise NumericsError(
                f"the gradient norm is {norm}; the step was not taken. Lower {'rl' if 'pg' in tally.losses else 'sft'}"
                "_optimizer.learning_rate, or resume from an earlier checkpoint."
            )
        if freeze is not None:
            freeze.step(optimizer.optimizer)
        else:
            optimizer.optimizer.step()
        optimizer.updates += 1
        self._clear()
        return self._report(update, tally, norm, rate)

    def accumulate(self, update: Update) -> _Tally:
        """The gradient of the whole update in `.grad`, summed over micro-batches and ranks."""
        tally = _Tally(losses={term.name: 0.0 for term in update.terms})
        scales = self._scales(update)
        live = _live(update)
        chosen = [update.sequences[i] for i in live]
        with self.policy.autocast():
            for plan in plan_micro_batches(chosen, self.micro_batch_tokens):
                batch = pack(chosen, plan)
                origin = [live[i] for i in batch.indices]
                self._backward(update, batch, origin, scales, tally)
        if not live:  # a gradient of zero is still a step of AdamW: its momentum moves on
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter)
        self.world.sum_gradients(self.parameters)
        return tally

    def _scales(self, update: Update) -> dict[str, list[float]]:
        """s_i of every sequence in every stream; 0 where the stream does not see the sequence."""
        lengths = {term.name: [_counted(term, s) for s in update.sequences] for term in update.terms}
        totals = update_totals(list(lengths.values()), self.world.all_sum)
        return {
            term.name: [sequence_scale(n, total, term.normalizer, term.constant_tokens) for n in lengths[term.name]]
            for term, total in zip(update.terms, totals, strict=True)
        }

    def _backward(
        self,
        update: Update,
        batch: MicroBatch,
        origin: SequenceOf[int],
        scales: dict[str, list[float]],
        tally: _Tally,
    ) -> None:
        logp_T, entropy_T = self.policy.token_stats(batch)
        sequence_T = batch.sequence_T.to(logp_T.device)
        old_T = _rows(update.old_logprobs, origin, logp_T) if update.old_logprobs is not None else None
        ref_T = self._reference_logprobs(batch) if any(t.uses_reference for t in update.terms) else None
        loss = logp_T.new_zeros(())
        for term in update.terms:
            weights = [update.sequences[i].weights.get(term.name, 0.0) for i in origin]
            stats = TokenStats(
                logp_T=logp_T,
                entropy_T=entropy_T if term.uses_entropy_gradient else entropy_T.detach(),
                weight_T=logp_T.new_tensor(weights)[sequence_T],
                sequence_T=sequence_T,
                old_logp_T=old_T if term.uses_old_policy else None,
                ref_logp_T=ref_T if term.uses_reference else None,
            )
            scale_T = logp_T.new_tensor([scales[term.name][i] for i in origin])[sequence_T]
            if term.select is not None:
                scale_T = scale_T * top_entropy_tokens(entropy_T, sequence_T, term.select.fraction)
            value = term.coefficient * weighted_sum(term.loss(stats), scale_T)
            tally.losses[term.name] += float(value.detach())
            loss = loss + value
            if isinstance(term.loss, PolicyGradient):
                tally.clipped += float(term.loss.clipped(stats).sum())
        loss.backward()
        self._count(update, batch, origin, logp_T.detach(), entropy_T.detach(), tally)

    def _count(
        self,
        update: Update,
        batch: MicroBatch,
        origin: SequenceOf[int],
        logp_T: Tensor,
        entropy_T: Tensor,
        tally: _Tally,
    ) -> None:
        tally.tokens += len(logp_T)
        tally.fed += batch.tokens
        tally.entropy += float(entropy_T.sum())
        sampled = [update.sequences[i].sampler_logprobs for i in origin]
        if all(row is not None for row in sampled):
            sampled_T = logp_T.new_tensor([value for row in sampled if row is not None for value in row])
            tally.gap += float((sampled_T - logp_T).abs().sum())
            tally.gap_tokens += len(logp_T)

    @torch.no_grad()
    def logprobs(self, sequences: SequenceOf[Sequence], policy: Policy | None = None) -> list[tuple[float, ...]]:
        """Log-probs of every response under the current policy (or another), in the order given; no gradient."""
        policy = policy or self.policy
        rows: list[tuple[float, ...]] = [()] * len(sequences)
        with policy.autocast():
            for plan in plan_micro_batches(sequences, self.micro_batch_tokens):
                batch = pack(sequences, plan)
                logp_T, _ = policy.token_stats(batch)
                lengths = [len(sequences[i].response_ids) for i in batch.indices]
                for index, row in zip(batch.indices, logp_T.cpu().split(lengths), strict=True):
                    rows[index] = tuple(row.tolist())
        return rows

    @torch.no_grad()
    def _reference_logprobs(self, batch: MicroBatch) -> Tensor:
        assert self.reference is not None
        return self.reference.token_stats(batch)[0]

    def _clip(self, clip_norm: float | None) -> float:
        grads = [p.grad for p in self.parameters if p.grad is not None]
        if not grads:
            return 0.0
        norm = torch.nn.utils.get_total_norm(grads)
        if clip_norm is not None and bool(torch.isfinite(norm)):
            torch.nn.utils.clip_grads_with_norm_(self.parameters, clip_norm, norm)
        return float(norm)

    def _clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def _report(self, update: Update, tally: _Tally, norm: float, rate: float) -> UpdateReport:
        return UpdateReport(
            loss=sum(tally.losses.values()),
            losses=tally.losses,
            grad_norm=norm,
            learning_rate=rate,
            sequences=len(update.sequences),
            trained_sequences=len(_live(update)),
            tokens=tally.tokens,
            fed_tokens=tally.fed,
            entropy=tally.entropy / max(1, tally.tokens),
            clip_fraction=tally.clipped / max(1, tally.tokens),
            sampler_gap=tally.gap / tally.gap_tokens if tally.gap_tokens else None,
        )


def _counted(term: Term, sequence: Sequence) -> int:
    """Tokens of a sequence in the denominator of a term; 0 if the term does not see it."""
    if term.name not in sequence.weights:
        return 0
    length = len(sequence.response_ids)
    if term.denominator == "kept" and term.select is not None:
        return kept_count(length, term.select.fraction)
    return length


def _live(update: Update) -> list[int]:
    """Sequences that can have a gradient: an all-equal group without other terms is left out, exactly."""
    return [i for i, s in enumerate(update.sequences) if s.response_ids and any(s.weights.values())]


def _rows(values: SequenceOf[SequenceOf[float]], origin: SequenceOf[int], like: Tensor) -> Tensor:
    return like.new_tensor([value for i in origin for value in values[i]])
