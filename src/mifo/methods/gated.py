"""HPT and SuperRL (docs/methods.md): each question is learned by RL or from its demonstration, by what its rollouts say.

    L = 1/|batch| Σ_x  c(x)·PG(x) + (1 − c(x))·β·NLL(x)

    hpt                   c(x) = 1[share of correct rollouts > γ]
    superrl, reward       c(x) = 1[max_k R_k > 0],  β = 1
    superrl, advantage    c(x) = 1[max_k A_k > 0],  β = 1: also all-correct groups imitate

The third form of SuperRL has no gate: `methods.log_sigma`.

With `denominator = "batch"` the sums are divided as if every question had taken part in both streams, so that one failed question
among a hundred weighs a hundredth; "stream" divides by those that do take part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mifo.config.schema import Config, HptMethod, SuperRlMethod
from mifo.methods.base import Method, Stateless
from mifo.methods.log_sigma import LogSigma
from mifo.methods.mixture import demonstrations_of, imitation_of, joined, own_update, parts, refers, scaled, with_silent
from mifo.types import Group, Phase, Update


class Gated(Stateless):
    """RL or imitation, question by question: `by_rl` is c(x)."""

    needs_demonstrations = True
    least_demonstrations = 1
    optimizers = ("rl",)

    def __init__(
        self,
        method: HptMethod | SuperRlMethod,
        config: Config,
        *,
        sft_coefficient: float,
        by_rl: Callable[[Group], bool],
    ) -> None:
        self.rl, self.sft, self.denominator = method.rl, method.sft, method.denominator
        self.sft_coefficient, self.by_rl = sft_coefficient, by_rl
        self.longest_response = config.rollout.max_response_tokens
        self.longest_demonstration = config.data.max_demonstration_tokens
        self.needs_reference = refers(method.rl, method.sft)

    def next_phase(self) -> Phase:
        """N rollouts of each question."""
        rl = self.rl
        return Phase(name="mixed", optimizer="rl", prompts=rl.prompts_per_step, rollouts=rl.rollouts_per_prompt)

    def updates(self, phase: Phase, groups: Sequence[Group]) -> list[Update]:
        """pg on the rollouts of some questions, β·ce on the demonstrations of the others."""
        return [update for part in parts(groups, self.rl.updates_per_step) for update in self._gated(part)]

    def _gated(self, groups: Sequence[Group]) -> list[Update]:
        explored = [group for group in groups if self.by_rl(group)]
        imitated = [group for group in groups if not self.by_rl(group)]
        own = [own_update(self.rl, side, self.longest_response) for side in (explored, imitated)]
        taught = [
            imitation_of(self.sft, demonstrations_of(side), self.longest_demonstration) for side in (imitated, explored)
        ]
        silent = self.denominator == "batch"
        return joined(
            with_silent(own[0], own[1] if silent else []),
            scaled(with_silent(taught[0], taught[1] if silent else []), self.sft_coefficient),
        )


class Hpt(Gated):
    """Hybrid post-training: imitation where at most a share γ of the rollouts is correct."""

    def __init__(self, method: HptMethod, config: Config) -> None:
        super().__init__(
            method,
            config,
            sft_coefficient=method.sft_coefficient,
            by_rl=lambda group: group.accuracy > method.accuracy_threshold,
        )


class SuperRl(Gated):
    """SuperRL's instance-level switch: any positive reward, or any positive advantage (rewards that are not all equal)."""

    def __init__(self, method: SuperRlMethod, config: Config) -> None:
        super().__init__(
            method,
            config,
            sft_coefficient=1.0,
            by_rl=lambda group: max(group.rewards) > (0.0 if method.gate == "reward" else min(group.rewards)),
        )


def superrl(method: SuperRlMethod, config: Config) -> Method:
    """SuperRL in the form that is asked for."""
    return LogSigma(method, config) if method.gate == "log_sigma" else SuperRl(method, config)
