"""Selections that look at a whole update before any of it is learned: the prefix tokens of highest entropy.

A pass without gradients gives the entropies; what is not selected gets weight 0 and still counts in every denominator. The choice
does not depend on micro-batches or on how sequences are spread over ranks, but for ties, which go to the lower rank, the earlier
sequence and the earlier token. A recipe that names a published code may rank as that code does, within its micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import replace

import torch
from torch import Tensor

from mifo.core.reduce import published_micro_batches
from mifo.core.select import top_entropy_of_all
from mifo.core.topk import Shards
from mifo.train.parallel import World
from mifo.types import Sequence, TopPrefixEntropy, Update

Scores = Callable[[SequenceOf[Sequence]], SequenceOf[tuple[Tensor, Tensor]]]
"""(log-probs, entropies) of the responses of some sequences, on the CPU, without gradients."""


def select_prefixes(update: Update, scores: Scores, world: World) -> Update:
    """The update with the choices of its `TopPrefixEntropy` terms in its weights; the same update where it has none.

    Where an entropy is not finite nothing is selected: the log-probs are not finite either, and the gradient finds out whose.
    """
    selects = {term.name: term.select for term in update.terms if isinstance(term.select, TopPrefixEntropy)}
    if not selects:
        return update
    update = replace(update, terms=tuple(replace(t, select=None) if t.name in selects else t for t in update.terms))
    begun = [i for i, s in enumerate(update.sequences) if s.prefix_tokens]
    lengths = [update.sequences[i].prefix_tokens for i in begun]
    prefixes = [replace(s, response_ids=s.response_ids[: s.prefix_tokens]) for s in update.sequences if s.prefix_tokens]
    entropy_T = torch.cat([torch.empty(0), *(entropy.float() for _, entropy in scores(prefixes))])
    if int(world.all_sum((~torch.isfinite(entropy_T)).sum())):
        return update
    sequences = list(update.sequences)
    shards = Shards(world.rank, world.size, world.all_sum)
    for name, select in selects.items():
        kept = _kept(select, dict(zip(begun, entropy_T.split(lengths), strict=True)), update.sequences, shards)
        for i, kept_P in kept.items():
            sequences[i] = _silenced(sequences[i], name, kept_P.tolist())
    return replace(update, sequences=tuple(sequences))


def _kept(
    select: TopPrefixEntropy, entropies: Mapping[int, Tensor], sequences: SequenceOf[Sequence], shards: Shards
) -> dict[int, Tensor]:
    """Which prefix tokens are kept, bool, of each sequence that has some: ranked together, or within a code's micro-batches."""
    together = [list(entropies)]
    if select.within is not None:
        assert shards.size == 1, "the micro-batches of a published code are cut from the whole update"
        batches = published_micro_batches([len(s.prompt_ids) + len(s.response_ids) for s in sequences], select.within)
        together = [[i for i in batch if i in entropies] for batch in batches]
    kept: dict[int, Tensor] = {}
    for ranked in together:
        entropy_T = torch.cat([torch.empty(0), *(entropies[i] for i in ranked)])
        chosen = top_entropy_of_all(entropy_T, select.fraction, shards).split([len(entropies[i]) for i in ranked])
        kept |= dict(zip(ranked, chosen, strict=True))
    return kept


def _silenced(sequence: Sequence, name: str, kept: SequenceOf[bool]) -> Sequence:
    """A sequence whose prefix tokens have weight 0 in a term unless they are kept."""
    if name not in sequence.weights:
        return sequence
    weight = sequence.weights[name]
    rows = list(weight) if isinstance(weight, tuple) else [weight] * len(sequence.response_ids)
    rows[: len(kept)] = [value if keep else 0.0 for value, keep in zip(rows, kept, strict=False)]
    return replace(sequence, weights={**sequence.weights, name: tuple(rows)})
