"""One optimizer step from one update: forward, backward, reduce, mask, clip, judge, step, freeze (DESIGN 3).

    N_s ← counts of stream s over the whole update, all ranks          core.reduce, the only division
    for each micro-batch:  Σ_s c_s Σ_t scale_t f_t  .backward()
    g ← Σ_ranks g;   g ← (1 − M) ⊙ g;   clip ‖g‖;   step;   put masked elements back

A step whose numbers are not finite is not taken, and neither is one that the guard rejects. An update that does not fit into
memory is done again in smaller pieces, from zero gradients.

Legend: T response tokens of a micro-batch, S sequences of the update.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

import torch
from torch import Tensor, nn

from mifo.core.freeze import ElementFreeze
from mifo.core.losses import PolicyGradient
from mifo.core.reduce import Totals, published_scales, sequence_scale, update_totals, weighted_sum
from mifo.core.surgery import GradientDrop
from mifo.data.pack import MicroBatch, pack, plan_micro_batches
from mifo.train.adapters import Adapters
from mifo.train.faults import Fault, Sample, blame, check_weights, sample_of, seen_rows
from mifo.train.gap import GAP_TOKENS, ROUNDING_TOKENS, SamplerWatch
from mifo.train.guard import Guard
from mifo.train.memory import DoesNotFit, fitting, smaller_budget
from mifo.train.optim import ScheduledAdamW
from mifo.train.parallel import World
from mifo.train.policy import Policy
from mifo.train.rows import (
    counted_rows,
    counted_tokens,
    first_tokens,
    is_sampled,
    live_sequences,
    sampler_rows,
    target_rows,
    token_rows,
    view,
    vocabulary_of,
)
from mifo.train.selection import select_prefixes
from mifo.train.tally import Tally, UpdateReport
from mifo.types import Sequence, Term, TokenStats, Update

Result = TypeVar("Result")
Scales = dict[str, list[float]]
Visit = Callable[[MicroBatch, list[int]], None]


class Learner:
    """Turns updates into optimizer steps on a policy.

    Args:
        policy: what is trained.
        micro_batch_tokens: most tokens in one forward pass; results do not depend on it. Halved where memory runs out.
        world: the ranks.
        reference: the frozen policy of KL terms, or None.
        sampler_watch: judges the gap between sampler and trainer, or None where they cannot be compared.
        window: where an update may be broken off (see `Stop.window`): while its gradient is computed.
        gradient_drop: clears a random share of each summed gradient, or None.
    """

    def __init__(
        self,
        policy: Policy,
        *,
        micro_batch_tokens: int,
        world: World | None = None,
        reference: Policy | None = None,
        sampler_watch: SamplerWatch | None = None,
        window: Callable[[], AbstractContextManager[None]] = nullcontext,
        gradient_drop: GradientDrop | None = None,
    ) -> None:
        self.policy = policy
        self.micro_batch_tokens = micro_batch_tokens
        self.world = world or World()
        self.reference, self.sampler_watch, self.window = reference, sampler_watch, window
        self.reference_name: str | None = None  # see `train.reference`
        self.reference_taken = False  # from the policy; otherwise it is the model as it was loaded
        self.parameters = policy.parameters
        self.gradient_drop = gradient_drop
        self.adapters: Adapters | None = None  # what is trained in place of the parameters, while there are some

    @property
    def trained(self) -> list[nn.Parameter]:
        """What the next update moves."""
        return self.parameters if self.adapters is None else self.adapters.parameters

    def apply(
        self,
        update: Update,
        optimizer: ScheduledAdamW,
        *,
        freeze: ElementFreeze | None = None,
        guard: Guard | None = None,
        step: int | None = None,
    ) -> UpdateReport:
        """Take one optimizer step, or skip it: then parameters and moments keep their bits, and the report says why.

        A rollback that the guard orders undoes the step before. A phase that freezes elements has none: it is short, and going
        back would have to go into the phase before. `step` numbers the steps of a run for the masks of `gradient_drop`.

        Raises:
            NumericsError: weights are not finite; names them.
            DeviceError: a single sequence does not fit into memory.
        """
        rate = optimizer.prepare()
        with self.window():
            update = self._selected(update)
            tally = self.accumulate(update)
        if self.gradient_drop is not None:
            assert step is not None, "a fresh mask needs the number of the step"
            self.gradient_drop.apply(dict(self.policy.model.named_parameters()), step)
        if freeze is not None:
            freeze.mask_gradients()
        norm = math.nan if tally.faults else self._clip(optimizer.config.clip_norm)
        fault = self._not_finite(update, tally, norm)
        if fault is None and guard is not None:
            fault = guard.judge(tally.loss, norm)
        limit = self._gap_limit(update, tally)
        taken = fault is None or fault.action == "warn"
        if taken:
            if guard is not None and freeze is None:
                guard.keep(self.trained, optimizer)
            self._step(optimizer, freeze)
        elif guard is not None and fault is not None and fault.action == "rollback":
            guard.good.restore(self.trained, optimizer)
        self._clear()
        return tally.report(
            update,
            grad_norm=norm,
            learning_rate=rate,
            sampler_gap_limit=limit,
            micro_batch_tokens=self.micro_batch_tokens,
            taken=taken,
            fault=fault,
        )

    def accumulate(self, update: Update) -> Tally:
        """The gradient of the whole update in `.grad`, summed over micro-batches and ranks; incomplete if `faults` is not 0."""
        update = self._selected(update)
        scales = self._scales(update)
        tally = self._while_it_fits(lambda: self._attempt(update, scales))
        tally.over_ranks(self.world)
        if not tally.faults:
            self.world.sum_gradients(self.trained)
        return tally

    def _selected(self, update: Update) -> Update:
        """The update with selections made that look at all of it; these take a pass without gradients."""
        return select_prefixes(
            update, lambda chosen: self._while_it_fits(lambda: self._scores(chosen, self.policy)), self.world
        )

    def _attempt(self, update: Update, scales: Scales) -> Tally:
        """This rank's part of the gradient, from zero."""
        self._clear()
        tally = Tally(losses={term.name: 0.0 for term in update.terms})
        live = live_sequences(update)
        self._score_unfed(update, live, tally)
        self._each_micro_batch(update, live, lambda batch, origin: self._backward(update, batch, origin, scales, tally))
        if not live:  # a gradient of zero is still a step of AdamW: its momentum moves on
            for parameter in self.trained:
                parameter.grad = torch.zeros_like(parameter)
        return tally

    def _each_micro_batch(self, update: Update, live: SequenceOf[int], visit: Visit) -> None:
        """Call `visit` with the micro-batches of the live sequences and their positions in the update.

        Raises:
            DoesNotFit: memory ran out in a visit.
        """
        chosen = [update.sequences[i] for i in live]
        with self.policy.autocast():
            for plan in plan_micro_batches(chosen, self.micro_batch_tokens):
                batch = pack(chosen, plan)
                with fitting(batch.tokens, len(plan)):
                    visit(batch, [live[i] for i in batch.indices])

    def _while_it_fits(self, attempt: Callable[[], Result]) -> Result:
        """The result of `attempt`, started afresh with half the budget whenever a micro-batch does not fit into memory."""
        while True:
            try:
                return attempt()
            except DoesNotFit as error:
                tokens, sequences = error.tokens, error.sequences
            # Outside the `except`: the traceback that held the activations is gone.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.micro_batch_tokens = smaller_budget(self.micro_batch_tokens, tokens, sequences)

    def _scales(self, update: Update) -> Scales:
        """s_i of every sequence in every stream; 0 where the stream does not see the sequence."""
        counted = {term.name: [counted_tokens(term, s) for s in update.sequences] for term in update.terms}
        totals = update_totals(list(counted.values()), self.world.all_sum)
        return {
            term.name: self._term_scales(term, counted[term.name], total, update)
            for term, total in zip(update.terms, totals, strict=True)
        }

    def _term_scales(self, term: Term, counted: list[int], totals: Totals, update: Update) -> list[float]:
        if term.published is None:
            return [sequence_scale(tokens, totals, term.normalizer, term.constant_tokens) for tokens in counted]
        assert self.world.size == 1, "the micro-batches of a published code are cut from the whole update"
        lengths = [len(s.prompt_ids) + len(s.response_ids) for s in update.sequences]
        return published_scales(counted, lengths, term.published, term.constant_tokens)

    def _backward(
        self, update: Update, batch: MicroBatch, origin: SequenceOf[int], scales: Scales, tally: Tally
    ) -> None:
        """Add one micro-batch to the gradient; one with a number that is not finite is blamed on its sequences instead."""
        sequences = [update.sequences[i] for i in origin]
        stats = self._forward(update, batch, origin)
        tally.tokens, tally.fed = tally.tokens + len(stats.logp_T), tally.fed + batch.tokens
        seen = seen_rows(stats, self.policy.quantity)
        if not bool(torch.isfinite(stats.logp_T.detach() + stats.entropy_T.detach()).all()):
            tally.blame(blame(seen, stats.sequence_T, sequences))  # and no term can select by such entropies
            return
        loss, amounts = stats.logp_T.new_zeros(()), []
        for term in update.terms:
            seen_by_term = view(term, stats, sequences)
            scale_T = stats.logp_T.new_tensor([scales[term.name][i] for i in origin])[stats.sequence_T]
            chosen_T = counted_rows(term, stats, sequences)
            if chosen_T is not None:
                scale_T = scale_T * chosen_T
            value_T = term.loss(seen_by_term)
            value = term.coefficient * weighted_sum(value_T, scale_T)
            amounts.append(float(value.detach()))
            tally.losses[term.name] += amounts[-1]
            loss = loss + value
            if isinstance(term.loss, PolicyGradient):
                tally.clipped += float(term.loss.clipped(seen_by_term).sum())
            counted_T = scale_T != 0
            seen[f"{term.name} weight"] = seen_by_term.weight_T.where(counted_T, 0.0)
            seen[f"{term.name} loss"] = value_T.detach().where(counted_T, 0.0)
        if not math.isfinite(sum(amounts)):
            culprits = blame(seen, stats.sequence_T, sequences)
            tally.blame(culprits or [sample_of(s, "sum of losses") for s in sequences])
            return
        loss.backward()
        self._count(stats, sequences, tally)

    def _forward(self, update: Update, batch: MicroBatch, origin: SequenceOf[int]) -> TokenStats:
        """Everything that any term of the update looks at; weights are each term's own, see `rows.view`."""
        vocabulary_T, statistic = None, vocabulary_of(update)
        if statistic is None:
            logp_T, entropy_T = self.policy.token_stats(batch)
        else:
            logp_T, entropy_T, vocabulary_T = self.policy.vocabulary_stats(batch, statistic, self.reference)
        sequence_T = batch.sequence_T.to(logp_T.device)
        old_T = None
        if update.old_logprobs is not None:
            old_T = token_rows([update.old_logprobs[i] for i in origin], logp_T)
        sequences = [update.sequences[i] for i in origin]
        return TokenStats(
            logp_T=logp_T,
            entropy_T=entropy_T,
            weight_T=torch.ones_like(logp_T),
            sequence_T=sequence_T,
            old_logp_T=old_T,
            ref_logp_T=self._reference_logprobs(batch) if any(t.uses_reference for t in update.terms) else None,
            sampler_logp_T=sampler_rows(sequences, sequence_T, logp_T.detach() if old_T is None else old_T),
            vocabulary_T=vocabulary_T,
            target_T=target_rows(sequences, logp_T.detach()),
        )

    @staticmethod
    def _count(stats: TokenStats, sequences: SequenceOf[Sequence], tally: Tally) -> None:
        tally.add_entropy(stats.entropy_T.detach())
        if stats.sampler_logp_T is not None:
            own_T = is_sampled(sequences, stats.sequence_T)
            old_T = stats.logp_T.detach() if stats.old_logp_T is None else stats.old_logp_T
            tally.add_gap(stats.sampler_logp_T[own_T], old_T[own_T])

    def _score_unfed(self, update: Update, live: SequenceOf[int], tally: Tally) -> None:
        """The gap where few or no rollouts are fed: an alarm must not be blind while all groups are all-equal.

        Where π_old was computed beforehand it is there for all sequences; otherwise a few are scored without gradients.
        """
        if self.sampler_watch is None:
            return
        fed = set(live)
        unfed = [i for i, s in enumerate(update.sequences) if i not in fed and s.sampler_logprobs is not None]
        if update.old_logprobs is not None:
            for i in unfed:
                sampled = update.sequences[i]
                old = update.old_logprobs[i][sampled.prefix_tokens :]
                tally.add_gap(torch.tensor(sampled.sampler_logprobs), torch.tensor(old))
            return
        held = sum(len(update.sequences[i].sampler_logprobs or ()) for i in live)
        chosen = first_tokens([update.sequences[i] for i in unfed], GAP_TOKENS - held)
        for sequence, (logp_T, entropy_T) in zip(chosen, self._scores(chosen, self.policy), strict=True):
            tally.add_gap(torch.tensor(sequence.sampler_logprobs), logp_T[sequence.prefix_tokens :])
            tally.add_entropy(entropy_T)

    def _gap_limit(self, update: Update, tally: Tally) -> float | None:
        gap = tally.mean_gap
        if self.sampler_watch is None or gap is None or tally.faults:
            return None
        return self.sampler_watch.limit(gap, lambda: self._rounding(update))

    def _rounding(self, update: Update) -> float:
        """Mean |Δ log-prob| that the low precision makes on some of the rollouts, against fp32 of the same weights."""
        assert self.sampler_watch is not None
        chosen = first_tokens([s for s in update.sequences if s.sampler_logprobs], ROUNDING_TOKENS)
        low, high = (
            self._while_it_fits(lambda dtype=dtype: self._scores(chosen, self.policy, dtype))  # type: ignore[misc]
            for dtype in (self.sampler_watch.dtype, torch.float32)
        )
        rows = zip(chosen, low, high, strict=True)
        return float(torch.cat([(a - b).abs()[s.prefix_tokens :] for s, (a, _), (b, _) in rows]).mean())

    def logprobs(self, sequences: SequenceOf[Sequence], policy: Policy | None = None) -> list[tuple[float, ...]]:
        """Log-probs of every response under the current policy (or another), in the order given; no gradient."""
        scores = self._while_it_fits(lambda: self._scores(sequences, policy or self.policy))
        return [tuple(logp_T.tolist()) for logp_T, _ in scores]

    @torch.no_grad()
    def _scores(
        self, sequences: SequenceOf[Sequence], policy: Policy, dtype: torch.dtype | None = None
    ) -> list[tuple[Tensor, Tensor]]:
        """(log-probs, entropies) of every response, on the CPU; in the policy's own arithmetic or another."""
        rows: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * len(sequences)
        with policy.autocast(dtype):
            for plan in plan_micro_batches(sequences, self.micro_batch_tokens):
                batch = pack(sequences, plan)
                with fitting(batch.tokens, len(plan)):
                    logp_T, entropy_T = (values_T.cpu() for values_T in policy.token_stats(batch))
                lengths = [len(sequences[i].response_ids) for i in batch.indices]
                for index, *row in zip(batch.indices, logp_T.split(lengths), entropy_T.split(lengths), strict=True):
                    rows[index] = (row[0], row[1])
        return rows

    @torch.no_grad()
    def _reference_logprobs(self, batch: MicroBatch) -> Tensor:
        assert self.reference is not None
        return self.reference.token_stats(batch)[0]

    def _not_finite(self, update: Update, tally: Tally, norm: float) -> Fault | None:
        """Why an update cannot be applied; the samples, and weights that are not finite, are looked for only here."""
        if not tally.faults and math.isfinite(norm):
            return None
        if tally.faults:
            reason = f"{tally.faults} of {len(update.sequences)} sequences have numbers that are not finite"
            samples = tally.samples
        else:
            reason, samples = f"the gradient norm is {norm}", self._overflowing(update)
        self._clear()
        check_weights(self.policy.model)
        return Fault(kind="not finite", reason=reason, samples=tuple(samples))

    def _overflowing(self, update: Update) -> list[Sample]:
        """The sequences of the micro-batches whose gradient is not finite; of the largest one, where only their sum is not."""
        scales = self._scales(update)
        found: list[tuple[float, list[Sample]]] = []

        def visit(batch: MicroBatch, origin: list[int]) -> None:
            self._clear()
            self._backward(update, batch, origin, scales, Tally(losses={term.name: 0.0 for term in update.terms}))
            what = f"gradient of a micro-batch of {len(origin)}"
            found.append((self._clip(None), [sample_of(update.sequences[i], what) for i in origin]))

        self._each_micro_batch(update, live_sequences(update), visit)
        overflowed = [sample for norm, samples in found if not math.isfinite(norm) for sample in samples]
        return overflowed or max(found, key=lambda entry: entry[0], default=(0.0, []))[1]

    def _clip(self, clip_norm: float | None) -> float:
        grads = [p.grad for p in self.trained if p.grad is not None]
        if not grads:
            return 0.0
        norm = torch.nn.utils.get_total_norm(grads)
        if clip_norm is not None and bool(torch.isfinite(norm)):
            torch.nn.utils.clip_grads_with_norm_(self.trained, clip_norm, norm)
        return float(norm)

    @staticmethod
    def _step(optimizer: ScheduledAdamW, freeze: ElementFreeze | None) -> None:
        if freeze is not None:
            freeze.step(optimizer.optimizer)
        else:
            optimizer.optimizer.step()
        optimizer.updates += 1

    def _clear(self) -> None:
        for parameter in self.trained:
            parameter.grad = None
