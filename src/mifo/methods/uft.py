"""UFT (docs/methods.md): all rollouts of a question continue the same hint, the first l of at most 5 chunks of the demonstration.

    L = GRPO(continuation) + 0.001·NLL(hint)        and in [method.rl]: 0.001·k3, 0.001 entropy, on continuations
    l ~ Binomial(5, p_t),  p_t = 0.05 + 0.45 (1 + cos(π t/T)),  l = 0 after step T = 300;  t counts from 1

    stage       l falls from 5 to 0 in even stages until T
    r3          l uniform in 0 … 5 to the end, no hint loss: hints = "uniform", hint_coefficient = 0

The authors split a solution by sentences, here by tokens, since a demonstration's text has no marked steps. A hint is part of the
prompt of its continuations, and enters once more, by itself, to be imitated: the mean over its tokens is that over N copies.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mifo.config.schema import Config, UftMethod
from mifo.core.draw import unit
from mifo.methods.base import Base
from mifo.methods.mixture import imitation_of, joined, own_update, parts, refers, scaled
from mifo.methods.prefix import as_hints, hint_of, prefix_of_parts
from mifo.types import Group, Phase, Update


@dataclass(frozen=True, slots=True)
class Hints:
    """How long the hint of each question is in one step: `Phase.prefixes`."""

    method: UftMethod
    seed: int
    step: int
    longest_response: int

    def __call__(self, problem_id: str, demonstration_tokens: int) -> tuple[int, ...]:
        """The same length for each of the N rollouts."""
        chunks = min(self.method.hint_chunks, demonstration_tokens - 1)
        taken = self._taken(problem_id, chunks)
        length = prefix_of_parts(taken, chunks, demonstration_tokens, self.longest_response)
        return (length,) * self.method.rl.rollouts_per_prompt

    @property
    def probability(self) -> float:
        """p_t of this step; 0 after the last step with hints."""
        method, t = self.method, self.step + 1
        if t > method.hint_steps:
            return 0.0
        fall = 0.5 * (1.0 + math.cos(math.pi * t / method.hint_steps))
        return method.hint_low + (method.hint_high - method.hint_low) * fall

    def share(self) -> float:
        """The part of a demonstration that is shown in this step, on average."""
        if self.method.hints == "binomial":
            return self.probability
        chunks = self.method.hint_chunks
        return 0.5 if self.method.hints == "uniform" else self._stage(chunks) / chunks

    def _taken(self, problem_id: str, chunks: int) -> int:
        key = (self.seed, "hint", self.step, problem_id)
        if self.method.hints == "uniform":
            return int(unit(*key) * (chunks + 1))
        if self.method.hints == "stage":
            return self._stage(chunks)
        return sum(unit(*key, chunk) < self.probability for chunk in range(chunks))

    def _stage(self, chunks: int) -> int:
        t = self.step + 1
        if t > self.method.hint_steps:
            return 0
        return max(0, chunks - t // (self.method.hint_steps // (chunks + 1)))


class Uft(Base):
    """Unified fine-tuning: RL on what follows a hint that shrinks, and imitation of the hint."""

    needs_demonstrations = True
    least_demonstrations = 1
    optimizers = ("rl",)

    def __init__(self, method: UftMethod, config: Config) -> None:
        self.method = method
        self.seed = config.train.seed
        self.longest_response = config.rollout.max_response_tokens
        self.longest_demonstration = config.data.max_demonstration_tokens
        self.needs_reference = refers(method.rl, method.sft)
        self.step = 0

    def _hints(self) -> Hints:
        return Hints(self.method, self.seed, self.step, self.longest_response)

    def next_phase(self) -> Phase:
        """N rollouts of each question, all after the same hint."""
        rl = self.method.rl
        return Phase(
            name="mixed",
            optimizer="rl",
            prompts=rl.prompts_per_step,
            rollouts=rl.rollouts_per_prompt,
            prefixes=self._hints(),
        )

    def updates(self, phase: Phase, groups: Sequence[Group]) -> list[Update]:
        """pg on continuations, ce on hints."""
        self.step += 1
        return [update for part in parts(groups, self.method.rl.updates_per_step) for update in self._hinted(part)]

    def _hinted(self, groups: Sequence[Group]) -> list[Update]:
        own = [as_hints(update) for update in own_update(self.method.rl, groups, self.longest_response)]
        coefficient = self.method.hint_coefficient
        hints = [hint for group in groups if (hint := hint_of(group)) is not None] if coefficient else []
        return joined(own, scaled(imitation_of(self.method.sft, hints, self.longest_demonstration), coefficient))

    def progress(self) -> Mapping[str, float]:
        """The part of demonstrations that the coming step shows."""
        return {"hint_share": self._hints().share()}

    def state_dict(self) -> dict[str, Any]:
        """Steps taken."""
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.step = int(state["step"])
