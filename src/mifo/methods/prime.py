"""PRIME: process rewards from an implicit reward model that is trained online, by outcomes alone.

    rollouts     the engine's reward model φ gives q_t = log π_φ − log π_ref of each token; π_ref is the model as it was loaded
    φ            BCE(σ(β Σ q), correct), one pass over the step; after q was taken, or before
    policy       PPO's objective; A adds leave-one-out advantages of outcome and of q (`core.process_reward`)

Questions whose share of correct rollouts is outside [0.2, 0.8] take no part. A rollout that could not be graded has no label, so
φ does not learn from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mifo.config.schema import Config, PrimeMethod
from mifo.core.process_reward import OutcomeCrossEntropy, prime_advantages
from mifo.methods.base import Stateless
from mifo.methods.grpo import rl_phase, shaped_rewards, weighted_updates
from mifo.methods.scored import rollouts_of, scores_of, split
from mifo.types import Group, Phase, ScorerName, Term, Update, Verdict

LABELS = {Verdict.CORRECT: 1.0, Verdict.WRONG: 0.0}


class Prime(Stateless):
    """RL with process rewards."""

    needs_demonstrations = False
    least_demonstrations = 0
    optimizers = ("rl",)
    needs_reference = True
    scorer: ScorerName | None = "prm"

    def __init__(self, method: PrimeMethod, config: Config) -> None:
        self.method = method
        self.longest_response = config.rollout.max_response_tokens

    def next_phase(self) -> Phase:
        """Always an RL step whose rollouts have process rewards."""
        phase = replace(rl_phase(self.method.rl), scorer_learns=self.method.prm_update)
        if phase.resample is None:
            return phase
        within = (self.method.least_accuracy, self.method.most_accuracy)
        return replace(phase, resample=replace(phase.resample, accuracy=within))

    def updates(self, phase: Phase, groups: Sequence[Group]) -> list[Update]:
        """Policy gradient by outcome and process rewards."""
        method, groups = self.method, self._chosen(groups)
        advantages = prime_advantages(
            [shaped_rewards(method.rl, group, self.longest_response) for group in groups],
            [scores_of(group) for group in groups],
            dense_coefficient=method.dense_coefficient,
            baseline=method.dense_baseline,
            normalise=method.dense_norm == "greatest_sum",
            discount=method.discount,
            whiten=method.whiten,
        )
        return weighted_updates(method.rl, groups, advantages, self.longest_response)

    def scorer_updates(self, phase: Phase, groups: Sequence[Group]) -> list[Update]:
        """The reward model towards the verdicts, of the same questions."""
        groups = self._chosen(groups)
        verdicts = [verdict for group in groups for verdict in group.verdicts]
        sequences = [
            replace(sequence, weights={"prm": 1.0}, target=LABELS[verdict])
            for sequence, verdict in zip(rollouts_of(groups), verdicts, strict=True)
            if verdict in LABELS
        ]
        term = Term(
            name="prm",
            loss=OutcomeCrossEntropy(self.method.beta),
            normalizer="sequence",
            uses_reference=True,
            uses_target=True,
        )
        return [
            Update(sequences=tuple(sequences[part]), terms=(term,))
            for part in split(len(sequences), self.method.prm_updates_per_step)
        ]

    def _chosen(self, groups: Sequence[Group]) -> list[Group]:
        """The groups that are neither too hard nor too easy; with dynamic sampling the first of them."""
        low, high = self.method.least_accuracy, self.method.most_accuracy
        kept = [group for group in groups if low <= group.accuracy <= high]
        return kept[: self.method.rl.prompts_per_step] if self.method.rl.dynamic_sampling else kept
