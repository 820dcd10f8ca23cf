"""SASR (docs/methods.md): an SFT warm-up, then SFT or RL step by step, by how large SFT's gradient still is.

    warm-up     SFT;  G_warm is the gradient norm of its last update, before clipping
    after it    SFT with probability p_t = G_last/(G_last + γ·G_warm), else GRPO
                G_last is the norm of the last SFT update; RL steps leave it as it is
    reference   KL terms compare with the policy at the end of the warm-up

Which of the two a step is depends on (seed, step) and p_t alone. SFT and RL keep an optimizer each. γ and the length of the
warm-up are not public to us: 1, and one epoch in the published recipe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mifo.config.schema import Config, SasrMethod
from mifo.core.draw import unit
from mifo.methods.base import Base
from mifo.methods.grpo import policy_gradient_updates, rl_phase
from mifo.methods.mixture import demonstrations_of, imitation_of, refers
from mifo.types import Group, Phase, Taken, Update

WARM = "warm"  # the reference: the policy at the end of the warm-up


class Sasr(Base):
    """Step-wise adaptive SFT and RL."""

    needs_demonstrations = True
    least_demonstrations = 1
    optimizers = ("rl", "sft")

    def __init__(self, method: SasrMethod, config: Config) -> None:
        self.method = method
        self.seed = config.train.seed
        self.longest_response = config.rollout.max_response_tokens
        self.longest_demonstration = config.data.max_demonstration_tokens
        self.needs_reference = refers(method.rl, method.sft)
        self.step = 0
        self.warm_norm: float | None = None
        self.last_norm: float | None = None

    @property
    def probability(self) -> float:
        """p_t of the coming step; 1 in the warm-up, and until an SFT update was taken."""
        if self.step < self.method.warmup_steps or self.warm_norm is None or self.last_norm is None:
            return 1.0
        total = self.last_norm + self.method.gamma * self.warm_norm
        return self.last_norm / total if total else 0.0

    def next_phase(self) -> Phase:
        """SFT or RL; both draw fresh problems. The forgetting meter would measure at every step, so it does not."""
        reference = None if self.step < self.method.warmup_steps else WARM
        if unit(self.seed, "sasr", self.step) < self.probability:
            batch = self.method.sft_batch_size
            return Phase(name="sft", optimizer="sft", prompts=batch, reference=reference, metered=False)
        return replace(rl_phase(self.method.rl), reference=reference)

    def updates(self, phase: Phase, groups: Sequence[Group]) -> list[Update]:
        """Imitation, or policy gradient."""
        self.step += 1
        if phase.name == "sft":
            return imitation_of(self.method.sft, demonstrations_of(groups), self.longest_demonstration)
        return policy_gradient_updates(self.method.rl, groups, self.longest_response)

    def learned(self, phase: Phase, steps: Sequence[Taken]) -> None:
        """G_last after an SFT step, and G_warm with it until the warm-up is over."""
        if phase.name != "sft" or not steps:
            return
        self.last_norm = steps[-1].grad_norm
        if phase.reference is None or self.warm_norm is None:
            self.warm_norm = self.last_norm

    def progress(self) -> Mapping[str, float]:
        """p_t of the step that comes next, and the norms it rests on once there are any."""
        norms = {"warm_norm": self.warm_norm, "last_norm": self.last_norm}
        return {"sft_probability": self.probability} | {name: norm for name, norm in norms.items() if norm is not None}

    def state_dict(self) -> dict[str, Any]:
        """Steps taken and both norms."""
        return {"step": self.step, "warm_norm": self.warm_norm, "last_norm": self.last_norm}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.step = int(state["step"])
        self.warm_norm, self.last_norm = state["warm_norm"], state["last_norm"]
