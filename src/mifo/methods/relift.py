"""ReLIFT (docs/methods.md): RL, and one SFT step on questions that it fails whenever enough of them have come together.

    RL step     GRPO; every question with acc(q) ≤ p (none right) and a verified demonstration joins the buffer B
    after it    if |B| ≥ S: one SFT update on S demonstrations; the others wait

Unlike MIFO's, the buffer is not emptied: what came in beyond S stays. The authors' code takes the newest first (`lifo`), so that
old questions may never be learned; first come, first learned is the default here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mifo.config.schema import Config, ReliftMethod
from mifo.core.buffer import QuestionBuffer
from mifo.methods.mixture import demonstrations_of, imitation_of
from mifo.methods.rl import AroundRl
from mifo.types import Group, Phase, Update


class Relift(AroundRl):
    """RL with SFT steps in between."""

    needs_demonstrations = False

    def __init__(self, method: ReliftMethod, config: Config) -> None:
        super().__init__(method, config)
        self.method = method
        self.least_demonstrations = method.buffer_size
        self.buffer = QuestionBuffer(method.buffer_size, method.buffer_order)
        self.learning = False

    def next_phase(self) -> Phase:
        """An SFT step after the RL step that filled the buffer, RL otherwise."""
        if self.learning:
            return Phase(name="sft", optimizer="sft", adapters=self.adapters)
        return self.rl.next_phase()

    def updates(self, phase: Phase, groups: Sequence[Group]) -> list[Update]:
        """RL: policy gradient, and failed questions to the buffer. SFT: S of them."""
        if phase.name == "sft":
            self.learning = False  # asked once after each RL step, also where the buffer is still full
            return imitation_of(self.method.sft, self.buffer.take(self.method.buffer_size), self.longest_demonstration)
        for demonstration in demonstrations_of([g for g in groups if g.accuracy <= self.method.accuracy_threshold]):
            self.buffer.add(demonstration)
        self.learning = self.buffer.full
        return self.rl.updates(phase, groups)

    def progress(self) -> Mapping[str, float]:
        """Buffer fill."""
        return {"buffer": len(self.buffer), "buffer_size": self.method.buffer_size}

    def state_dict(self) -> dict[str, Any]:
        """Buffer, whether an SFT step is due, and the RL's state."""
        return {"rl": self.rl.state_dict(), "buffer": self.buffer.state_dict(), "learning": self.learning}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.rl.load_state_dict(state["rl"])
        self.buffer.load_state_dict(state["buffer"])
        self.learning = bool(state["learning"])
