"""What methods share that put rollouts and demonstrations into one update.

Every stream keeps the denominator of the sequences that it sees. A sequence of weight 0 counts in it and adds nothing; where all
its weights are 0 the engine does not feed it at all.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from mifo.config.schema import ImitationConfig, PolicyGradientConfig
from mifo.methods.grpo import policy_gradient_updates
from mifo.methods.sft import demonstration_of, imitates_with_reference, imitation_updates
from mifo.types import Demonstration, Group, Update


def parts(groups: Sequence[Group], count: int) -> list[Sequence[Group]]:
    """The groups of a step for each of its updates, in order; as `policy_gradient_updates` splits them."""
    size = max(1, math.ceil(len(groups) / count))
    return [groups[start : start + size] for start in range(0, len(groups), size)]


def own_update(rl: PolicyGradientConfig, groups: Sequence[Group], longest_response: int) -> list[Update]:
    """The policy gradient of all the groups as one update; [] where there are none."""
    return policy_gradient_updates(replace(rl, updates_per_step=1), groups, longest_response)


def demonstrations_of(groups: Sequence[Group]) -> list[Demonstration]:
    """The demonstrations of the groups that have one."""
    return [d for group in groups if (d := demonstration_of(group)) is not None]


def refers(rl: PolicyGradientConfig, sft: ImitationConfig) -> bool:
    """Some term compares with the model as it was loaded."""
    return rl.kl_coefficient > 0 or imitates_with_reference(sft)


def imitation_of(
    sft: ImitationConfig, demonstrations: Sequence[Demonstration], longest_demonstration: int
) -> list[Update]:
    """Imitation of demonstrations, of the tokens that `sft` selects, in `updates_per_batch` updates; [] where there are none."""
    if not demonstrations:
        return []
    return imitation_updates(
        sft,
        demonstrations,
        token_fraction=sft.token_fraction,
        token_denominator="all",
        longest_demonstration=longest_demonstration,
    )


def scaled(updates: Sequence[Update], coefficient: float, only: str | None = None) -> list[Update]:
    """The updates with the coefficients of their terms (or of the one named `only`) multiplied."""
    return [
        replace(
            update,
            terms=tuple(
                replace(t, coefficient=t.coefficient * coefficient) if only in (None, t.name) else t
                for t in update.terms
            ),
        )
        for update in updates
    ]


def with_silent(spoken: Sequence[Update], silent: Sequence[Update]) -> list[Update]:
    """One update in which the sequences of `silent` count in the denominators and add nothing; [] of nothing."""
    if not spoken and not silent:
        return []
    sequences = [s for update in spoken for s in update.sequences]
    sequences += [replace(s, weights=dict.fromkeys(s.weights, 0.0)) for update in silent for s in update.sequences]
    return [Update(sequences=tuple(sequences), terms=[*spoken, *silent][0].terms)]


def joined(own: Sequence[Update], imitation: Sequence[Update]) -> list[Update]:
    """One update of both streams' sequences and terms; an entropy bonus of the demonstrations is named `sft_ent`."""
    names = {"ent": "sft_ent"}
    renamed = [
        Update(
            sequences=tuple(
                replace(s, weights={names.get(name, name): weight for name, weight in s.weights.items()})
                for s in update.sequences
            ),
            terms=tuple(replace(t, name=names.get(t.name, t.name)) for t in update.terms),
        )
        for update in imitation
    ]
    both = [*own, *renamed]
    if not both:
        return []
    return [
        Update(
            sequences=tuple(s for update in both for s in update.sequences),
            terms=tuple(term for update in both for term in update.terms),
        )
    ]
