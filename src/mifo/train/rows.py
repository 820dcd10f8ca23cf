"""What a micro-batch holds, row by row: which sequences are worth feeding, and what each term sees of them.

Legend: T response tokens of a micro-batch.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import torch
from torch import Tensor

from mifo.core.select import kept_count, top_entropy_tokens
from mifo.types import Sequence, Term, TokenStats, TopEntropy, Update, VocabularyStatistic, Weight


def live_sequences(update: Update) -> list[int]:
    """Sequences that can have a gradient: an all-equal group without other terms is left out, exactly."""
    return [i for i, s in enumerate(update.sequences) if s.response_ids and any(map(_is_heard, s.weights.values()))]


def _is_heard(weight: Weight) -> bool:
    return any(weight) if isinstance(weight, tuple) else weight != 0


def demonstrated(updates: SequenceOf[Update]) -> list[str]:
    """Problems whose demonstration has a part in the gradient, once for each update: learned, or continued by rollouts."""
    ids = []
    for update in updates:
        live = [update.sequences[i] for i in live_sequences(update)]
        learned = [s.problem_id for s in live if s.sampler_logprobs is None]
        continued = dict.fromkeys(s.problem_id for s in live if s.prefix_tokens or s.hint_tokens)
        ids += learned + [name for name in continued if name not in learned]
    return ids


def counted_tokens(term: Term, sequence: Sequence) -> int:
    """Tokens of a sequence in the denominator of a term; 0 if the term does not see it."""
    if term.name not in sequence.weights:
        return 0
    length = len(sequence.response_ids)
    if term.span != "response":
        length = sequence.prefix_tokens if term.span == "prefix" else length - sequence.prefix_tokens
    if term.denominator == "kept" and isinstance(term.select, TopEntropy):
        return kept_count(length, term.select.fraction)
    return length


def counted_rows(term: Term, stats: TokenStats, sequences: SequenceOf[Sequence]) -> Tensor | None:
    """Which tokens take part in a term, bool [T]: those of its span, and of these the ones selected; None where all do."""
    select = term.select if isinstance(term.select, TopEntropy) else None
    if term.span == "response":
        return select and top_entropy_tokens(stats.entropy_T, stats.sequence_T, select.fraction)
    continued_T = _is_continued(sequences, stats.sequence_T)
    span_T = continued_T if term.span == "continuation" else ~continued_T
    if select is None:
        return span_T
    chosen_T = torch.zeros_like(span_T)
    chosen_T[span_T] = top_entropy_tokens(stats.entropy_T[span_T], stats.sequence_T[span_T], select.fraction)
    return chosen_T


def _is_continued(sequences: SequenceOf[Sequence], sequence_T: Tensor) -> Tensor:
    """Which tokens come after the prefix of their response, bool [T]."""
    lengths = torch.tensor([[len(s.response_ids), s.prefix_tokens] for s in sequences], device=sequence_T.device)
    first_S = lengths[:, 0].cumsum(0) - lengths[:, 0] + lengths[:, 1]
    return torch.arange(len(sequence_T), device=sequence_T.device) >= first_S[sequence_T]


def vocabulary_of(update: Update) -> VocabularyStatistic | None:
    """What the terms of an update need of whole distributions; one statistic at most."""
    wanted = {term.vocabulary for term in update.terms if term.vocabulary is not None}
    assert len(wanted) <= 1, f"an update computes one vocabulary statistic, not {len(wanted)}"
    return next(iter(wanted), None)


def first_tokens(sequences: SequenceOf[Sequence], tokens: int) -> list[Sequence]:
    """The first sequences that hold at least so many response tokens together (all of them, if they hold fewer)."""
    chosen, held = [], 0
    for sequence in sequences:
        if held >= tokens:
            break
        if sequence.response_ids:
            chosen.append(sequence)
            held += len(sequence.response_ids)
    return chosen


def token_rows(values: SequenceOf[SequenceOf[float]], like: Tensor) -> Tensor:
    """The values of several sequences end to end, [T], on the device and in the type of `like`."""
    return like.new_tensor([value for row in values for value in row])


def is_sampled(sequences: SequenceOf[Sequence], sequence_T: Tensor) -> Tensor:
    """Which tokens come from the rollout engine, bool [T]; the others are a demonstration's."""
    flags = [s.sampler_logprobs is not None for s in sequences]
    return torch.tensor(flags, device=sequence_T.device)[sequence_T] & _is_continued(sequences, sequence_T)


def sampler_rows(sequences: SequenceOf[Sequence], sequence_T: Tensor, old_T: Tensor) -> Tensor | None:
    """log π_sampler, [T], and of π_old where a token was not sampled, so that its importance weight is 1; None without any."""
    if all(s.sampler_logprobs is None for s in sequences):
        return None
    rows = [
        (0.0,) * len(s.response_ids)
        if s.sampler_logprobs is None
        else (0.0,) * s.prefix_tokens + tuple(s.sampler_logprobs)
        for s in sequences
    ]
    return torch.where(is_sampled(sequences, sequence_T), token_rows(rows, old_T), old_T)


def target_rows(sequences: SequenceOf[Sequence], like: Tensor) -> Tensor | None:
    """What regressions should find, [T], and 0 for sequences without a target; None where none has one."""
    if all(s.target is None for s in sequences):
        return None
    return token_rows([_spread(s.target or 0.0, s) for s in sequences], like)


def _spread(weight: Weight, sequence: Sequence) -> SequenceOf[float]:
    return weight if isinstance(weight, tuple) else (weight,) * len(sequence.response_ids)


def view(term: Term, stats: TokenStats, sequences: SequenceOf[Sequence]) -> TokenStats:
    """What one term sees of a micro-batch: its own weights, and nothing that it did not ask for."""
    return replace(
        stats,
        entropy_T=stats.entropy_T if term.uses_entropy_gradient else stats.entropy_T.detach(),
        weight_T=_weight_rows(term, sequences, stats),
        old_logp_T=stats.old_logp_T if term.uses_old_policy else None,
        ref_logp_T=stats.ref_logp_T if term.uses_reference else None,
        sampler_logp_T=stats.sampler_logp_T if term.uses_sampler else None,
        vocabulary_T=stats.vocabulary_T if term.vocabulary is not None else None,
        target_T=stats.target_T if term.uses_target else None,
    )


def _weight_rows(term: Term, sequences: SequenceOf[Sequence], stats: TokenStats) -> Tensor:
    """The weight of every token in one term, [T]."""
    weights = [s.weights.get(term.name, 0.0) for s in sequences]
    if not any(isinstance(weight, tuple) for weight in weights):
        return stats.logp_T.new_tensor(weights)[stats.sequence_T]
    rows = [_spread(weight, sequence) for weight, sequence in zip(weights, sequences, strict=True)]
    return token_rows(rows, stats.logp_T)
