"""SFT and RL one after the other: SFT→RL, RL→SFT, and the two in turn.

    sft_rl        k SFT steps, then RL for the rest of train.steps
    rl_sft        k RL steps, then SFT for the rest
    multi_stage   (k SFT steps, m RL steps) again and again; K cycles are train.steps = K·(k + m)

Each stage begins with an optimizer without moments and its schedule from the start, RL also with its second model (critic,
reward model) made anew; π_old is the policy at the start of each rollout batch. Terms with a reference (KL, off by default; ASFT)
compare with the policy as the stage under way found it: the first with the model as it was loaded. So do the stages of a
`[[stages]]` list.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mifo.config.schema import Config, MultiStageMethod, RlSftMethod, SftRlMethod
from mifo.methods.mixture import demonstrations_of, imitation_of
from mifo.methods.rl import AroundRl, make_rl
from mifo.types import Group, Phase, Update


class Stages(AroundRl):
    """Steps of each kind by their number alone."""

    needs_demonstrations = True
    least_demonstrations = 1

    def __init__(self, method: SftRlMethod | RlSftMethod | MultiStageMethod, config: Config) -> None:
        super().__init__(method, config)
        self.method, self.config = method, config
        self.step = 0

    def next_phase(self) -> Phase:
        """SFT or RL by the number of steps taken; both draw fresh problems."""
        stage = self._stage
        reference = None if stage == 0 else f"part {stage + 1}"
        if not self._in_sft:
            return replace(self.rl.next_phase(), fresh=True, reference=reference)
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
        if phase.name != "sft":
            updates = self.rl.updates(phase, groups)
        else:
            updates = imitation_of(self.method.sft, demonstrations_of(groups), self.longest_demonstration)
            self.rl = make_rl(self.method, self.config)  # RL that follows begins anew
        self.step += 1
        return updates

    def progress(self) -> Mapping[str, float]:
        """No figures beside the step's own."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Steps taken, and the RL's state."""
        return {"step": self.step, "rl": self.rl.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.rl.load_state_dict(state["rl"])
        self.step = int(state["step"])
