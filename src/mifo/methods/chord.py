"""CHORD (docs/methods.md): L = (1 − μ_t)·GRPO + μ_t·SFT, on rollouts of some questions and demonstrations of others.

    mu          μ_t falls from its peak to its valley, every token of a demonstration counts alike
    phi         μ fixed, tokens weighted by φ = p(1 − p): sft.loss = "chord_phi"
    both        μ_t with a warm-up, and φ

(1 − μ_t) multiplies the policy-gradient term; KL and entropy bonus keep their coefficients. The authors draw demonstrations from
a set of their own; here they are the next problems of the same stream, so no question is sampled and shown in one epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mifo.config.schema import ChordMethod, Config
from mifo.core.mixing import warmup_cosine
from mifo.methods.base import Base
from mifo.methods.mixture import demonstrations_of, imitation_of, joined, own_update, parts, refers, scaled
from mifo.types import Group, Phase, Update


class Chord(Base):
    """On-policy RL and off-policy SFT with a coefficient that follows the steps."""

    needs_demonstrations = True
    least_demonstrations = 1
    optimizers = ("rl",)

    def __init__(self, method: ChordMethod, config: Config) -> None:
        self.method = method
        self.longest_response = config.rollout.max_response_tokens
        self.longest_demonstration = config.data.max_demonstration_tokens
        self.needs_reference = refers(method.rl, method.sft)
        self.step = 0

    @property
    def mu(self) -> float:
        """μ_t of the coming step."""
        method = self.method
        return warmup_cosine(
            self.step,
            warmup=method.mu_warmup_steps,
            decay=method.mu_decay_steps,
            peak=method.mu_peak,
            valley=method.mu_valley,
        )

    def next_phase(self) -> Phase:
        """Rollouts of some questions, demonstrations of others."""
        rl = self.method.rl
        return Phase(
            name="mixed",
            optimizer="rl",
            prompts=rl.prompts_per_step,
            rollouts=rl.rollouts_per_prompt,
            demonstrations=self.method.demonstrations_per_step,
        )

    def updates(self, phase: Phase, groups: Sequence[Group]) -> list[Update]:
        """(1 − μ)·pg on rollouts and μ·ce on demonstrations, split alike between the step's updates."""
        mu, count = self.mu, self.method.rl.updates_per_step
        self.step += 1
        sampled = parts([group for group in groups if group.rollouts], count)
        shown = parts([group for group in groups if not group.rollouts], count)
        return [
            update
            for own, expert in zip(sampled, shown, strict=True)
            for update in joined(
                scaled(own_update(self.method.rl, own, self.longest_response), 1.0 - mu, only="pg"),
                scaled(imitation_of(self.method.sft, demonstrations_of(expert), self.longest_demonstration), mu),
            )
        ]

    def progress(self) -> Mapping[str, float]:
        """μ of the step that comes next."""
        return {"mu": self.mu}

    def state_dict(self) -> dict[str, Any]:
        """Steps taken."""
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.step = int(state["step"])
