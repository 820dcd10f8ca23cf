"""GRPO and its switches; MIFO's defaults are the Dr.GRPO-like ones (no std, no length norm, no KL).

Dr.GRPO, DAPO, GSPO, CISPO, RLOO and REINFORCE++ are settings of `PolicyGradientConfig` (docs/methods.md), so every method that
has an RL phase takes any of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from mifo.config.schema import Config, GrpoMethod, PolicyGradientConfig
from mifo.core.advantages import overlong_reward, step_advantages
from mifo.core.losses import EntropyBonus, KlToReference, PolicyGradient
from mifo.methods.base import Stateless
from mifo.types import Group, Phase, Resample, Term, Update, Weight
from mifo.types import Sequence as TrainingSequence


def rl_phase(rl: PolicyGradientConfig) -> Phase:
    """A step of RL: what it samples, with dynamic sampling or without."""
    if not rl.dynamic_sampling:
        return Phase(name="rl", optimizer="rl", prompts=rl.prompts_per_step, rollouts=rl.rollouts_per_prompt)
    return Phase(
        name="rl",
        optimizer="rl",
        prompts=rl.dynamic_prompts or rl.prompts_per_step,
        rollouts=rl.rollouts_per_prompt,
        resample=Resample(groups=rl.prompts_per_step, rounds=rl.dynamic_rounds),
    )


def policy_gradient_terms(rl: PolicyGradientConfig, longest_response: int) -> tuple[Term, ...]:
    """The streams of an RL update: pg, and kl and ent where their coefficients are not zero."""
    constant = (rl.constant_tokens or longest_response) if rl.normalizer == "constant" else None
    terms = [
        Term(
            name="pg",
            loss=PolicyGradient(
                rl.clip_low, rl.clip_high, rl.dual_clip, rl.importance_cap, ratio=rl.ratio, clip=rl.clip
            ),
            normalizer=rl.normalizer,
            constant_tokens=constant,
            uses_old_policy=True,
            uses_sampler=rl.importance_cap is not None,
        )
    ]
    if rl.kl_coefficient:
        terms.append(
            Term(
                name="kl",
                loss=KlToReference(),
                coefficient=rl.kl_coefficient,
                normalizer=rl.normalizer,
                constant_tokens=constant,
                uses_reference=True,
            )
        )
    if rl.entropy_coefficient:
        terms.append(
            Term(name="ent", loss=EntropyBonus(), coefficient=rl.entropy_coefficient, uses_entropy_gradient=True)
        )
    return tuple(terms)


def policy_gradient_updates(rl: PolicyGradientConfig, groups: Sequence[Group], longest_response: int) -> list[Update]:
    """The groups of one step split evenly, in order, into `updates_per_step` updates.

    A sequence of an all-equal group has advantage 0: it counts in the denominator, and where no other term sees it the
    engine leaves its forward and backward pass out. A step whose rollouts failed has no groups, and no updates. Dynamic
    sampling takes the first `prompts_per_step` groups that are mixed; where its cap left fewer, the updates are smaller.
    """
    groups = chosen_groups(rl, groups)
    advantages = step_advantages(
        [shaped_rewards(rl, group, longest_response) for group in groups],
        [[len(rollout.logprobs) for rollout in group.rollouts] for group in groups],
        rl.advantage,
        divide_by_std=rl.advantage_std,
    )
    return weighted_updates(rl, groups, advantages, longest_response)


def chosen_groups(rl: PolicyGradientConfig, groups: Sequence[Group]) -> Sequence[Group]:
    """What of a step is learned from: all groups, or with dynamic sampling the first that are mixed."""
    if not rl.dynamic_sampling:
        return groups
    return [group for group in groups if group.mixed][: rl.prompts_per_step]


def weighted_updates(
    rl: PolicyGradientConfig,
    groups: Sequence[Group],
    advantages: Sequence[Sequence[Weight]],
    longest_response: int,
) -> list[Update]:
    """The groups split evenly, in order, into `updates_per_step` updates; an advantage for each rollout or each of its tokens."""
    terms = policy_gradient_terms(rl, longest_response)
    weighted = [_weighted(group, row, terms) for group, row in zip(groups, advantages, strict=True)]
    size = max(1, math.ceil(len(groups) / rl.updates_per_step))
    return [
        Update(sequences=tuple(s for rows in weighted[start : start + size] for s in rows), terms=terms)
        for start in range(0, len(groups), size)
    ]


def shaped_rewards(rl: PolicyGradientConfig, group: Group, longest_response: int) -> list[float]:
    """The rewards, lowered for responses that come near the longest allowed if `overlong_tokens` says so."""
    margin = rl.overlong_tokens
    if margin is None:
        return list(group.rewards)
    return [
        reward + overlong_reward(len(rollout.token_ids), longest_response, margin, rl.overlong_penalty)
        for reward, rollout in zip(group.rewards, group.rollouts, strict=True)
    ]


def _weighted(group: Group, advantages: Sequence[Weight], terms: Sequence[Term]) -> list[TrainingSequence]:
    return [
        TrainingSequence(
            problem_id=group.problem.id,
            prompt_ids=group.prompt_ids,
            response_ids=rollout.token_ids,
            weights={term.name: advantage if term.name == "pg" else 1.0 for term in terms},
            sampler_logprobs=rollout.logprobs,
            weight_version=rollout.weight_version,
            rollout=index,
            prefix_tokens=rollout.prefix_tokens,
        )
        for index, (rollout, advantage) in enumerate(zip(group.rollouts, advantages, strict=True))
    ]


class Grpo(Stateless):
    """RL alone."""

    needs_demonstrations = False
    least_demonstrations = 0
    optimizers = ("rl",)

    def __init__(self, method: GrpoMethod, config: Config) -> None:
        self.rl = method.rl
        self.needs_reference = method.rl.kl_coefficient > 0
        self.longest_response = config.rollout.max_response_tokens

    def next_phase(self) -> Phase:
        """Always an RL step."""
        return rl_phase(self.rl)

    def updates(self, phase: Phase, groups: Sequence[Group]) -> list[Update]:
        """Policy-gradient updates on the own rollouts."""
        return policy_gradient_updates(self.rl, groups, self.longest_response)
