"""LUFFY (docs/methods.md): each group holds a demonstration beside the rollouts, and they share one baseline.

    group       N − 1 rollouts and the demonstration; A = R − mean over all N
    rollouts    −ψ(r, A)         (unclipped in the authors' code)
    demo        −A·p/(p+γ)       p the current probability, γ = 0.1

Both sums are divided by the count over all N, as one loss over the group. Entropy bonus and KL term look at rollouts only. The
demonstration's reward is that of a correct answer: it was verified when the data was read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mifo.config.schema import Config, LuffyMethod
from mifo.core.advantages import group_advantages
from mifo.core.mixing import OffPolicy
from mifo.methods.base import Stateless
from mifo.methods.mixture import own_update, parts
from mifo.methods.sft import demonstration_of, demonstration_sequence
from mifo.types import Group, Phase, Term, Update
from mifo.types import Sequence as TrainingSequence


class Luffy(Stateless):
    """Mixed-policy GRPO with shaped off-policy demonstrations."""

    needs_demonstrations = True
    least_demonstrations = 1
    optimizers = ("rl",)

    def __init__(self, method: LuffyMethod, config: Config) -> None:
        self.rl, self.gamma = method.rl, method.gamma
        self.reward = config.reward.correct
        self.longest_response = config.rollout.max_response_tokens
        self.needs_reference = method.rl.kl_coefficient > 0

    def next_phase(self) -> Phase:
        """N − 1 rollouts of each question; the demonstration is the last of its group."""
        rl = self.rl
        return Phase(name="mixed", optimizer="rl", prompts=rl.prompts_per_step, rollouts=rl.rollouts_per_prompt - 1)

    def updates(self, phase: Phase, groups: Sequence[Group]) -> list[Update]:
        """Rollouts with pg, demonstrations with off, one denominator for both."""
        return [self._mixed(part) for part in parts(groups, self.rl.updates_per_step)]

    def _mixed(self, groups: Sequence[Group]) -> Update:
        [own] = own_update(self.rl, groups, self.longest_response)
        pg = own.terms[0]
        off = Term(
            name="off",
            loss=OffPolicy(self.gamma),
            normalizer=pg.normalizer,
            constant_tokens=pg.constant_tokens,
        )
        sampled = iter(own.sequences)
        sequences: list[TrainingSequence] = []
        for group in groups:
            *advantages, of_demonstration = group_advantages(
                (*group.rewards, self.reward), divide_by_std=self.rl.advantage_std
            )
            for advantage in advantages:
                sequence = next(sampled)
                sequences.append(replace(sequence, weights={**sequence.weights, "pg": advantage, "off": 0.0}))
            demonstration = demonstration_of(group)
            assert demonstration is not None, group.problem.id
            sequences.append(demonstration_sequence(demonstration, {"pg": 0.0, "off": of_demonstration}))
        return Update(sequences=tuple(sequences), terms=(*own.terms, off))
