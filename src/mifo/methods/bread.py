"""BREAD (docs/methods.md): a question whose rollouts fail is rolled out again from inside its demonstration, as far as needed.

    1. N rollouts of each question.
    2. A group with success in the band, or above it, stays. One below it is sampled again, with all N rollouts behind the first k
       of K = 10 episodes of the demonstration; k by binary search: further in after a failure, less far after a success.
    3. The group with the shortest prefix whose success is in the band takes the place of the failed one; where none is, the
       failed one stays, and has no gradient.
    4. GRPO on these groups; a prefix is context, without loss.

The band is (0, 0.8]: the paper's is not public to us. Episodes are even pieces of tokens. Success is the share of correct
rollouts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from mifo.config.schema import BreadMethod, Config
from mifo.methods.base import Stateless
from mifo.methods.grpo import policy_gradient_updates, rl_phase
from mifo.methods.prefix import as_hints, prefix_of_parts
from mifo.types import Group, Phase, Retry, Update


@dataclass(frozen=True, slots=True)
class Search:
    """The binary search over prefixes, from the groups that were sampled so far: `Phase.retries`."""

    method: BreadMethod
    longest_response: int

    def __call__(self, groups: Sequence[Group]) -> tuple[Retry, ...]:
        """The next prefix of every question whose search is not over."""
        success: dict[str, dict[int, float]] = {}
        tokens: dict[str, int] = {}
        for group in groups:
            assert group.demonstration_ids is not None, group.problem.id
            tokens[group.problem.id] = len(group.demonstration_ids)
            tried = success.setdefault(group.problem.id, {})
            prefix = prefix_of(group)
            tried[prefix] = min(tried.get(prefix, 1.0), group.accuracy)  # a question may occur twice where epochs meet
        found = {name: self.next_prefix(tried, tokens[name]) for name, tried in success.items()}
        return tuple(Retry(problem_id=name, prefix_tokens=n) for name, n in found.items() if n is not None)

    def next_prefix(self, success: Mapping[int, float], demonstration_tokens: int) -> int | None:
        """Tokens of the prefix to try next, from the success of those tried (0 among them); None where the search is over."""
        if not self.fails(success[0]):
            return None
        episodes = min(self.method.episodes, demonstration_tokens - 1)
        low, high = 0, episodes  # the first fails; the second would show everything
        while high - low > 1:
            middle = (low + high) // 2
            prefix = prefix_of_parts(middle, episodes, demonstration_tokens, self.longest_response)
            if prefix not in success:
                return prefix
            if self.fails(success[prefix]):
                low = middle
            else:
                high = middle
        return None

    def fails(self, success: float) -> bool:
        """Below the band."""
        return success <= self.method.success_low

    def chosen(self, first: Sequence[Group], again: Sequence[Group]) -> list[Group]:
        """The groups to learn from, one for each of the first round."""
        best: dict[str, Group] = {}
        for group in sorted(again, key=prefix_of, reverse=True):  # the shortest prefix is written last
            if not self.fails(group.accuracy) and group.accuracy <= self.method.success_high:
                best[group.problem.id] = group
        return [best.pop(group.problem.id, group) if self.fails(group.accuracy) else group for group in first]


def prefix_of(group: Group) -> int:
    """Demonstration tokens that the rollouts of a group begin with."""
    return group.rollouts[0].prefix_tokens


class Bread(Stateless):
    """Branched rollouts from expert anchors."""

    needs_demonstrations = True
    least_demonstrations = 1
    optimizers = ("rl",)

    def __init__(self, method: BreadMethod, config: Config) -> None:
        self.rl = method.rl
        self.longest_response = config.rollout.max_response_tokens
        self.needs_reference = method.rl.kl_coefficient > 0
        self.search = Search(method, self.longest_response)

    def next_phase(self) -> Phase:
        """N rollouts of each question, and again of those that fail."""
        return replace(rl_phase(self.rl), name="mixed", retries=self.search)

    def updates(self, phase: Phase, groups: Sequence[Group]) -> list[Update]:
        """Policy gradient on the groups that the search chose."""
        chosen = self.search.chosen(groups[: phase.prompts], groups[phase.prompts :])
        return [as_hints(update) for update in policy_gradient_updates(self.rl, chosen, self.longest_response)]
