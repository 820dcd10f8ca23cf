"""MIFO (S0 §3, Algorithm 1): RL collects what the model fails, a short SFT phase learns it without undoing RL.

    RL phase    GRPO; every question with acc(q) ≤ p and a verified demonstration joins the buffer B; ends after the first
                step with |B| ≥ S
    SFT phase   cross-entropy on the top-ρ tokens of each demonstration by entropy; the elements RL moved most (top k of the
                importance map with history α) do not move; ends when B is empty

How the paper's open points are resolved: docs/methods.md. The ablations are settings: Int is ρ = 1, k = 0; ES is k = 0;
PF is ρ = 1; MIFO† is α = 0. k and ρ may follow the forgetting meter (`methods.control`). The RL may be
PPO or PRIME (`methods.rl`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mifo.config.schema import Config, MifoMethod
from mifo.core.buffer import QuestionBuffer
from mifo.methods.control import FreezeControl
from mifo.methods.rl import AroundRl
from mifo.methods.sft import demonstration_of, imitation_updates
from mifo.types import Freeze, Group, Phase, Update


class Mifo(AroundRl):
    """RL→SFT intervals with entropy selection and element freezing."""

    needs_demonstrations = False

    def __init__(self, method: MifoMethod, config: Config) -> None:
        super().__init__(method, config)
        self.method = method
        self.buffer = QuestionBuffer(method.buffer_size, method.buffer_order)
        self.least_demonstrations = method.buffer_size
        self.learning = False
        self.optimizers = ("rl", "sft") if method.optimizers == "separate" else ("rl",)
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
        return self.rl.next_phase()

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
        return self.rl.updates(phase, groups)

    def sft_measured(self, before: float, after: float) -> None:
        """What the phase cost steers k and ρ of the next, where that is asked for."""
        self.control.measured(before, after)

    def progress(self) -> Mapping[str, float]:
        """Buffer fill; k and ρ where they are steered."""
        return {"buffer": len(self.buffer), "buffer_size": self.method.buffer_size, **self.control.progress()}

    def state_dict(self) -> dict[str, Any]:
        """Buffer, whether an SFT phase is under way, the RL's state and the control."""
        return {
            "rl": self.rl.state_dict(),
            "buffer": self.buffer.state_dict(),
            "learning": self.learning,
            "control": self.control.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.rl.load_state_dict(state["rl"])
        self.buffer.load_state_dict(state["buffer"])
        self.learning = bool(state["learning"])
        self.control.load_state_dict(state["control"])
