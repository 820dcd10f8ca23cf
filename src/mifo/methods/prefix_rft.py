"""Prefix-RFT (docs/methods.md): one of the N rollouts of a question continues the beginning of its demonstration.

    prefix      the first ⌊l·|y*|⌋ tokens, l ~ U(low_t, 0.95), low_t from 0.95 to 0.05 by a cosine over 500 steps
    loss        −ψ(r, A) on prefix and continuation alike; r = π/π_old on both
    prefix      A = 0 but for the 20 % of prefix tokens of highest entropy, ranked over the whole update
    A           R − mean over all N, for the whole hybrid; or a baseline of the N − 1 others (`core.advantages.hybrid_advantages`)

The denominator counts every token, also those without an advantage. The authors' code ranks over the prefix tokens of a
micro-batch, so that what is learned there depends on its size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mifo.config.schema import Config, PrefixRftMethod
from mifo.core.advantages import hybrid_advantages
from mifo.core.draw import unit
from mifo.core.mixing import warmup_cosine
from mifo.methods.base import Base
from mifo.methods.mixture import own_update, parts
from mifo.methods.prefix import longest_prefix
from mifo.types import Group, Phase, Term, TopPrefixEntropy, Update
from mifo.types import Sequence as TrainingSequence


@dataclass(frozen=True, slots=True)
class OneHybrid:
    """The last of the N rollouts of a question begins inside its demonstration: `Phase.prefixes`."""

    rollouts: int
    low: float
    high: float
    seed: int
    step: int
    longest_response: int

    def __call__(self, problem_id: str, demonstration_tokens: int) -> tuple[int, ...]:
        """0 for all but the last."""
        share = self.low + (self.high - self.low) * unit(self.seed, "prefix", self.step, problem_id)
        length = max(1, math.floor(round(share * demonstration_tokens, 9)))  # 0.95·40 is 38 however 0.95 is made
        most = longest_prefix(demonstration_tokens, self.longest_response)
        return (0,) * (self.rollouts - 1) + (min(most, length),)


class PrefixRft(Base):
    """RL on groups with one hybrid of demonstration and rollout."""

    needs_demonstrations = True
    least_demonstrations = 1
    optimizers = ("rl",)

    def __init__(self, method: PrefixRftMethod, config: Config) -> None:
        self.method = method
        self.seed = config.train.seed
        self.longest_response = config.rollout.max_response_tokens
        self.needs_reference = method.rl.kl_coefficient > 0
        self.step = 0

    @property
    def low(self) -> float:
        """low_t of the coming step."""
        method = self.method
        return warmup_cosine(
            self.step,
            warmup=0,
            decay=method.prefix_decay_steps,
            peak=method.prefix_low_start,
            valley=method.prefix_low_end,
        )

    def next_phase(self) -> Phase:
        """N − 1 plain rollouts of each question and a hybrid."""
        rl = self.method.rl
        hybrid = OneHybrid(
            rollouts=rl.rollouts_per_prompt,
            low=self.low,
            high=self.method.prefix_high,
            seed=self.seed,
            step=self.step,
            longest_response=self.longest_response,
        )
        return Phase(
            name="mixed",
            optimizer="rl",
            prompts=rl.prompts_per_step,
            rollouts=rl.rollouts_per_prompt,
            prefixes=hybrid,
        )

    def updates(self, phase: Phase, groups: Sequence[Group]) -> list[Update]:
        """pg on rollouts and hybrids, one denominator for all their tokens."""
        self.step += 1
        return [self._mixed(part) for part in parts(groups, self.method.rl.updates_per_step)]

    def _mixed(self, groups: Sequence[Group]) -> Update:
        [own] = own_update(self.method.rl, groups, self.longest_response)
        advantages = [
            pair
            for group in groups
            for pair in hybrid_advantages(
                group.rewards, self.method.advantage, divide_by_std=self.method.rl.advantage_std
            )
        ]
        sequences = [_weighted(s, *pair) for s, pair in zip(own.sequences, advantages, strict=True)]
        return Update(sequences=tuple(sequences), terms=tuple(self._shaped(term) for term in own.terms))

    def _shaped(self, term: Term) -> Term:
        fraction = self.method.prefix_token_fraction
        if term.name == "pg" and fraction < 1.0:
            return replace(term, select=TopPrefixEntropy(fraction=fraction))
        if term.name == "ent" and self.method.entropy_span == "continuation":
            return replace(term, span="continuation")
        return term

    def progress(self) -> Mapping[str, float]:
        """low_t of the step that comes next."""
        return {"prefix_low": self.low}

    def state_dict(self) -> dict[str, Any]:
        """Steps taken."""
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.step = int(state["step"])


def _weighted(sequence: TrainingSequence, of_prefix: float, of_rest: float) -> TrainingSequence:
    """The sequence with its advantages; one number where prefix and continuation have the same."""
    prefix = sequence.prefix_tokens
    if prefix == 0 or of_prefix == of_rest:
        return replace(sequence, weights={**sequence.weights, "pg": of_rest})
    rest = len(sequence.response_ids) - prefix
    return replace(sequence, weights={**sequence.weights, "pg": (of_prefix,) * prefix + (of_rest,) * rest})
