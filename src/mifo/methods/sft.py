"""SFT on demonstrations: token-mean cross-entropy, optionally on the highest-entropy tokens only (S0 §3.1)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mifo.config.schema import Config, ImitationConfig, SftMethod
from mifo.core.losses import CrossEntropy, EntropyBonus
from mifo.types import Demonstration, Freeze, Group, Phase, Term, TopEntropy, Update
from mifo.types import Sequence as TrainingSequence


def imitation_update(
    sft: ImitationConfig,
    demonstrations: Sequence[Demonstration],
    *,
    token_fraction: float,
    token_denominator: Literal["all", "kept"],
    longest_demonstration: int,
) -> Update:
    """One SFT update: ce on the top-ρ tokens by entropy, ent where its coefficient is not zero.

    With the denominator "all" the loss is the token form of the paper's 1/|s| (METHODS 7, resolution 13): keeping fewer
    tokens makes a smaller update, not one of the same size on fewer tokens.
    """
    constant = (sft.constant_tokens or longest_demonstration) if sft.normalizer == "constant" else None
    terms = [
        Term(
            name="ce",
            loss=CrossEntropy(),
            normalizer=sft.normalizer,
            constant_tokens=constant,
            select=TopEntropy(fraction=token_fraction) if token_fraction < 1.0 else None,
            denominator=token_denominator,
        )
    ]
    if sft.entropy_coefficient:
        terms.append(
            Term(name="ent", loss=EntropyBonus(), coefficient=sft.entropy_coefficient, uses_entropy_gradient=True)
        )
    return Update(
        sequences=tuple(
            TrainingSequence(
                problem_id=d.problem_id,
                prompt_ids=d.prompt_ids,
                response_ids=d.response_ids,
                weights={term.name: 1.0 for term in terms},
            )
            for d in demonstrations
        ),
        terms=tuple(terms),
    )


def demonstration_of(group: Group) -> Demonstration | None:
    """The group's problem with its verified demonstration, if it has one."""
    if group.demonstration_ids is None:
        return None
    return Demonstration(problem_id=group.problem.id, prompt_ids=group.prompt_ids, response_ids=group.demonstration_ids)


class Sft:
    """SFT alone."""

    needs_demonstrations = True
    least_demonstrations = 1
    needs_reference = False
    freeze: Freeze | None = None

    def __init__(self, method: SftMethod, config: Config) -> None:
        self.method = method
        self.longest_demonstration = config.data.max_demonstration_tokens

    def next_phase(self) -> Phase:
        """Always an SFT step on fresh problems, without rollouts."""
        return Phase(name="sft", optimizer="sft", prompts=self.method.batch_size)

    def updates(self, phase: Phase, groups: Sequence[Group]) -> list[Update]:
        """One imitation update on the demonstrations of the groups."""
        demonstrations = [d for group in groups if (d := demonstration_of(group)) is not None]
        return [
            imitation_update(
                self.method.sft,
                demonstrations,
                token_fraction=self.method.token_fraction,
                token_denominator="all",
                longest_demonstration=self.longest_demonstration,
            )
        ]

    def progress(self) -> Mapping[str, float]:
        """No state to report."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """No state."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """No state."""
