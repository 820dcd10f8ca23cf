"""SFT and RL one after the other (METHODS 5): SFT→RL, RL→SFT, and the two in turn.

    sft_rl        k SFT steps, then RL for the rest of train.steps
    rl_sft        k RL steps, then SFT for the rest
    multi_stage   (k SFT steps, m RL steps) again and again; K cycles are train.steps = K·(k + m)

Each stage begins with an optimizer without moments and its schedule from the start; π_old is the policy at the start of each
rollout batch. Terms with a reference (KL, off by default; ASFT) compare with the policy as the stage under way found it: the
first with the model as it was loaded. So do the stages of a `[[stages]]` list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mifo.config.schema import Config, MultiStageMethod, RlSftMethod, SftRlMethod
from mifo.methods.base import Base
from mifo.methods.grpo import policy_gradient_updates, rl_phase
from mifo.methods.mixture import demonstrations_of, imitation_of, refers
from mifo.methods.sft import adapters_of
from mifo.types import Group, Phase, Update


class Stages(Base):
    """Steps of each kind by their number alone."""

    needs_demonstrations = True
    least_demonstrations = 1
    optimizers = ("rl", "sft")

    def __init__(self, method: SftRlMethod | RlSftMethod | MultiStageMethod, config: Config) -> None:
        self.method, self.rl, self.sft = method, method.rl, method.sft
        self.longest_response = config.rollout.max_response_tokens
        self.longest_demonstration = config.data.max_demonstration_tokens
        self.needs_reference = refers(method.rl, method.sft)
        self.adapters = adapters_of(method.sft)
        self.step = 0

    def next_phase(self) -> Phase:
        """SFT or RL by the number of steps taken; both draw fresh problems."""
        stage = self._stage
        reference = None if stage == 0 else f"part {stage + 1}"
        if not self._in_sft:
            return replace(rl_phase(self.rl), fresh=True, reference=reference)
        batch = self.method.sft_batch_size
        return Phase(
            name="sft", optimizer="sft", prompts=batch, fresh=True, adapters=self.adapters, reference=reference
        )

    @property
    def _stage(self) -> int:
        """How many stages lie behind the coming step."""
        method, step = self.method, self.step
        if isinstance(method, MultiStageMethod):
            cycles, step = divmod(step, method.sft_steps + method.rl_steps)
            return 2 * cycles + (step >= method.sft_steps)
        first = method.rl_steps if isinstance(method, RlSftMethod) else method.sft_steps
        return int(step >= first)

    @property
    def _in_sft(self) -> bool:
        return self._stage % 2 == (1 if isinstance(self.method, RlSftMethod) else 0)

    def updates(self, phase: Phase, groups: Sequence[Group]) -> list[Update]:
        """Imitation, or policy gradient."""
        self.step += 1
        if phase.name == "sft":
            return imitation_of(self.sft, demonstrations_of(groups), self.longest_demonstration)
        return policy_gradient_updates(self.rl, groups, self.longest_response)

    def progress(self) -> Mapping[str, float]:
        """No figures beside the step's own."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Steps taken."""
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.step = int(state["step"])
