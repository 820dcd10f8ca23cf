"""MIFO (S0 §3, Algorithm 1): RL collects what the model fails, a short SFT phase learns it without undoing RL.

    RL phase    GRPO; every question with acc(q) ≤ p and a verified demonstration joins the buffer B; ends after the first
                step with |B| ≥ S
    SFT phase   cross-entropy on the top-ρ tokens of each demonstration by entropy; the elements RL moved most (top k of the
                importance map with history α) do not move; ends when B is empty

Resolutions of the paper's open points are those of METHODS 7. The ablations are settings: Int is ρ = 1, k = 0; ES is k = 0;
PF is ρ = 1; MIFO† is α = 0. k and ρ may follow the forgetting meter (`methods.control`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mifo.config.schema import Config, MifoMethod
from mifo.core.buffer import QuestionBuffer
from mifo.methods.base import Base
from mifo.methods.control import FreezeControl
from mifo.methods.grpo import policy_gradient_updates, rl_phase
from mifo.methods.sft import adapters_of, demonstration_of, imitates_with_reference, imitation_updates
from mifo.types import Freeze, Group, Phase, Update


class Mifo(Base):
    """RL→SFT intervals with entropy selection and element freezing."""

    needs_demonstrations = False

    def __init__(self, method: MifoMethod, config: Config) -> None:
        self.method = method
        self.longest_response = config.rollout.max_response_tokens
        self.longest_demonstration = config.data.max_demonstration_tokens
        self.buffer = QuestionBuffer(method.buffer_size, method.buffer_order)
        self.least_demonstrations = method.buffer_size
        self.learning = False
        self.optimizers = ("rl", "sft") if method.optimizers == "separate" else ("rl",)
        self.needs_reference = method.rl.kl_coefficient > 0 or imitates_with_reference(method.sft)
        self.adapters = adapters_of(method.sft)
        self.control = FreezeControl(method.control, freeze_top=method.freeze_top, token_fraction=method.token_fraction)
        if method.freeze_top > 0 or method.control.target_drop is not None:
            self.freeze = Freeze(
                top=method.freeze_top,
                history=method.history,
                mode=method.freeze,
                scope=method.freeze_scope,
                fill_ties=method.fill_ties,
            )

    def next_phase(self) -> Phase:
        """RL until the buffer is full, then SFT until it is empty."""
        if self.learning:
            return Phase(
                name="sft",
                optimizer="sft" if self.method.optimizers == "separate" else "rl",
                freeze=self.freeze and replace(self.freeze, top=self.control.freeze_top),
                adapters=self.adapters,
            )
        return rl_phase(self.method.rl)

    def updates(self, phase: Phase, groups: Sequence[Group]) -> list[Update]:
        """RL: policy gradient, and failed questions to the buffer. SFT: a batch from the buffer."""
        if phase.name == "sft":
            updates = imitation_updates(
                self.method.sft,
                self.buffer.take(self.method.sft_batch_size),
                token_fraction=self.control.token_fraction,
                token_denominator=self.method.token_denominator,
                longest_demonstration=self.longest_demonstration,
            )
            self.learning = len(self.buffer) > 0
            return updates
        for group in groups:
            demonstration = demonstration_of(group)
            if demonstration is not None and group.accuracy <= self.method.accuracy_threshold:
                self.buffer.add(demonstration)
        self.learning = self.buffer.full
        return policy_gradient_updates(self.method.rl, groups, self.longest_response)

    def sft_measured(self, before: float, after: float) -> None:
        """What the phase cost steers k and ρ of the next, where that is asked for."""
        self.control.measured(before, after)

    def progress(self) -> Mapping[str, float]:
        """Buffer fill; k and ρ where they are steered."""
        return {"buffer": len(self.buffer), "buffer_size": self.method.buffer_size, **self.control.progress()}

    def state_dict(self) -> dict[str, Any]:
        """Buffer, whether an SFT phase is under way, and the control."""
        return {
            "buffer": self.buffer.state_dict(),
            "learning": self.learning,
            "control": self.control.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.buffer.load_state_dict(state["buffer"])
        self.learning = bool(state["learning"])
        self.control.load_state_dict(state["control"])
