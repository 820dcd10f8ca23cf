"""SFT on demonstrations: token-mean cross-entropy or another loss, optionally on the highest-entropy tokens only (S0 §3.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from mifo.config.schema import Config, ImitationConfig, SftMethod
from mifo.core.imitation import (
    EAFT_TOP,
    AnchoredFineTuning,
    ChordPhi,
    DynamicFineTuning,
    EntropyAdaptive,
    GameEntropy,
)
from mifo.core.losses import CrossEntropy, EntropyBonus, PolicyGradient
from mifo.core.vocabulary import GemObjective, KlFromReference, TopLogitEntropy
from mifo.methods.base import Stateless
from mifo.types import (
    Demonstration,
    Group,
    LowRank,
    Phase,
    Term,
    TokenLoss,
    TopEntropy,
    Update,
    VocabularyStatistic,
    Weight,
)
from mifo.types import Sequence as TrainingSequence


def imitation_loss(sft: ImitationConfig) -> tuple[TokenLoss, VocabularyStatistic | None]:
    """The loss that `sft.loss` names, and what it needs of each token's whole distribution."""
    if sft.loss == "gem":
        return GameEntropy(), GemObjective(sft.gem_beta, sft.gem_weight)
    if sft.loss == "asft":
        return AnchoredFineTuning(sft.asft_kl), KlFromReference()
    if sft.loss == "eaft":
        return EntropyAdaptive(sft.eaft_alpha), TopLogitEntropy(EAFT_TOP)
    if sft.loss == "psft":
        return PolicyGradient(clip_low=None, clip_high=sft.psft_clip), None
    return {"cross_entropy": CrossEntropy(), "dft": DynamicFineTuning(), "chord_phi": ChordPhi()}[sft.loss], None


def imitates_with_reference(sft: ImitationConfig) -> bool:
    """The loss compares with the model as it was loaded."""
    _, statistic = imitation_loss(sft)
    return statistic is not None and statistic.needs_reference


def imitation_updates(
    sft: ImitationConfig,
    demonstrations: Sequence[Demonstration],
    *,
    token_fraction: float,
    token_denominator: Literal["all", "kept"],
    longest_demonstration: int,
) -> list[Update]:
    """One batch of demonstrations split evenly, in order, into at most `updates_per_batch` updates."""
    size = max(1, math.ceil(len(demonstrations) / sft.updates_per_batch))
    return [
        imitation_update(
            sft,
            demonstrations[start : start + size],
            token_fraction=token_fraction,
            token_denominator=token_denominator,
            longest_demonstration=longest_demonstration,
        )
        for start in range(0, max(1, len(demonstrations)), size)
    ]


def imitation_update(
    sft: ImitationConfig,
    demonstrations: Sequence[Demonstration],
    *,
    token_fraction: float,
    token_denominator: Literal["all", "kept"],
    longest_demonstration: int,
) -> Update:
    """One SFT update: ce (the loss chosen) on the top-ρ tokens by entropy, ent where its coefficient is not zero.

    With the denominator "all" the loss is the token form of the paper's 1/|s|: keeping fewer
    tokens makes a smaller update, not one of the same size on fewer tokens.
    """
    term = imitation_term(sft, token_fraction=token_fraction)
    constant = (sft.constant_tokens or longest_demonstration) if sft.normalizer == "constant" else None
    terms = [replace(term, normalizer=sft.normalizer, constant_tokens=constant, denominator=token_denominator)]
    if sft.entropy_coefficient:
        terms.append(
            Term(name="ent", loss=EntropyBonus(), coefficient=sft.entropy_coefficient, uses_entropy_gradient=True)
        )
    return Update(
        sequences=tuple(demonstration_sequence(d, {term.name: 1.0 for term in terms}) for d in demonstrations),
        terms=tuple(terms),
    )


def imitation_term(sft: ImitationConfig, *, token_fraction: float) -> Term:
    """The stream ce, as a token mean: the loss chosen, on the highest-entropy tokens."""
    loss, vocabulary = imitation_loss(sft)
    return Term(
        name="ce",
        loss=loss,
        select=TopEntropy(fraction=token_fraction) if token_fraction < 1.0 else None,
        uses_old_policy=sft.loss == "psft",
        vocabulary=vocabulary,
    )


def demonstration_sequence(demonstration: Demonstration, weights: Mapping[str, Weight]) -> TrainingSequence:
    """A demonstration as it enters an update, with its weight in each stream that sees it."""
    return TrainingSequence(
        problem_id=demonstration.problem_id,
        prompt_ids=demonstration.prompt_ids,
        response_ids=demonstration.response_ids,
        weights=weights,
    )


def adapters_of(sft: ImitationConfig) -> LowRank | None:
    """The adapters that SFT phases train, if they train any (S0 App. D.4)."""
    return None if sft.lora_rank is None else LowRank(rank=sft.lora_rank, alpha=sft.lora_alpha)


def demonstration_of(group: Group) -> Demonstration | None:
    """The group's problem with its verified demonstration, if it has one."""
    if group.demonstration_ids is None:
        return None
    return Demonstration(problem_id=group.problem.id, prompt_ids=group.prompt_ids, response_ids=group.demonstration_ids)


class Sft(Stateless):
    """SFT alone."""

    needs_demonstrations = True
    least_demonstrations = 1
    optimizers = ("sft",)

    def __init__(self, method: SftMethod, config: Config) -> None:
        self.method = method
        self.needs_reference = imitates_with_reference(method.sft)
        self.adapters = adapters_of(method.sft)
        self.longest_demonstration = config.data.max_demonstration_tokens

    def next_phase(self) -> Phase:
        """Always an SFT step on fresh problems, without rollouts."""
        return Phase(name="sft", optimizer="sft", prompts=self.method.batch_size, adapters=self.adapters)

    def updates(self, phase: Phase, groups: Sequence[Group]) -> list[Update]:
        """Imitation of the demonstrations of the groups."""
        demonstrations = [d for group in groups if (d := demonstration_of(group)) is not None]
        return imitation_updates(
            self.method.sft,
            demonstrations,
            token_fraction=self.method.token_fraction,
            token_denominator="all",
            longest_demonstration=self.longest_demonstration,
        )
