"""SRFT (docs/methods.md): demonstrations and rollouts in one stage, weighted by the policy's entropy.

    L =  E_demo[−c_s e^{−H} ℓ]  +  demo RL  +  E_{y+}[−c_r e^{+H} ℓ]  +  E_{y−}[+ℓ]

H is the mean token entropy of the response, a constant to the gradient; c_s = 0.5, c_r = 0.1. Demo RL is −A·p as in LUFFY, not
shaped unless `gamma` is set, with A over the group of rollouts and demonstration. The two sums over rollouts are divided by the
count over all of them, those over demonstrations by the count over demonstrations. Nothing is clipped. −ℓ of a demonstration may
be another loss of imitation (`method.sft`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mifo.config.schema import Config, SrftMethod
from mifo.core.advantages import group_advantages
from mifo.core.losses import CrossEntropy
from mifo.core.mixing import EntropyWeighted, OffPolicy
from mifo.methods.base import Stateless
from mifo.methods.mixture import parts
from mifo.methods.sft import demonstration_of, demonstration_sequence, imitates_with_reference, imitation_term
from mifo.types import Group, Phase, Term, Update, Verdict
from mifo.types import Sequence as TrainingSequence


class Srft(Stateless):
    """Supervised and reinforcement fine-tuning in one stage."""

    needs_demonstrations = True
    least_demonstrations = 1
    optimizers = ("rl",)

    def __init__(self, method: SrftMethod, config: Config) -> None:
        self.method = method
        self.reward = config.reward.correct
        self.needs_reference = imitates_with_reference(method.sft)

    def next_phase(self) -> Phase:
        """N rollouts of each question, and its demonstration."""
        method = self.method
        return Phase(name="mixed", optimizer="rl", prompts=method.prompts_per_step, rollouts=method.rollouts_per_prompt)

    def updates(self, phase: Phase, groups: Sequence[Group]) -> list[Update]:
        """Four streams: sft and off on demonstrations, pos and neg on rollouts."""
        return [
            Update(sequences=tuple(s for group in part for s in self._sequences(group)), terms=self._terms())
            for part in parts(groups, self.method.updates_per_step)
        ]

    def _terms(self) -> tuple[Term, ...]:
        method = self.method
        normalizer, scope = method.normalizer, method.entropy_scope
        imitation = imitation_term(method.sft, token_fraction=method.sft.token_fraction)
        weighted = EntropyWeighted(method.sft_scale, method.sft_entropy_sign, scope, imitation.loss)
        return (
            replace(imitation, name="sft", loss=weighted, normalizer=normalizer),
            Term(name="off", loss=OffPolicy(method.gamma), normalizer=normalizer),
            Term(name="pos", loss=EntropyWeighted(method.rl_scale, "plus", scope), normalizer=normalizer),
            Term(name="neg", loss=CrossEntropy(), normalizer=normalizer),
        )

    def _sequences(self, group: Group) -> list[TrainingSequence]:
        advantages = group_advantages((*group.rewards, self.reward), divide_by_std=self.method.advantage_std)
        sequences = []
        for index, (rollout, verdict) in enumerate(zip(group.rollouts, group.verdicts, strict=True)):
            right = verdict is Verdict.CORRECT
            sequences.append(
                TrainingSequence(
                    problem_id=group.problem.id,
                    prompt_ids=group.prompt_ids,
                    response_ids=rollout.token_ids,
                    weights={"pos": float(right), "neg": 0.0 if right else -self.method.negative_weight},
                    sampler_logprobs=rollout.logprobs,
                    weight_version=rollout.weight_version,
                    rollout=index,
                )
            )
        demonstration = demonstration_of(group)
        assert demonstration is not None, group.problem.id
        sequences.append(demonstration_sequence(demonstration, {"sft": 1.0, "off": advantages[-1]}))
        return sequences
