"""The second model of a run: what it scores, how it learns, and its state.

    critic   values of each token (`train.critic`)
    prm      implicit process rewards log π_φ − log π_ref of each token, φ a copy of the policy as it was loaded

It has parameters, an AdamW and a guard of its own; the learner is the policy's, so denominators, packing, faults and running out
of memory are handled alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from mifo.config.schema import Config
from mifo.train.critic import Critic, critic_model
from mifo.train.faults import check_state
from mifo.train.guard import Guard
from mifo.train.learner import Learner
from mifo.train.optim import ScheduledAdamW
from mifo.train.parallel import current_world
from mifo.train.policy import Policy
from mifo.train.state import cloned, copy_parameters
from mifo.types import ScorerName
from mifo.types import Sequence as TrainingSequence


class Scorer:
    """A model that gives each token of a rollout a number, and learns from the rollouts.

    Args:
        name: what it is; also the name of its checkpoint component.
        learner: of its parameters; of a "prm" with the reference.
        optimizer: over the same parameters.
        guard: of its updates.
    """

    def __init__(self, name: ScorerName, learner: Learner, optimizer: ScheduledAdamW, guard: Guard) -> None:
        self.name, self.learner, self.optimizer, self.guard = name, learner, optimizer, guard

    @property
    def parameters(self) -> int:
        """Trainable elements."""
        return sum(p.numel() for p in self.learner.parameters)

    @property
    def passes(self) -> int:
        """Forward passes that a score takes."""
        return 2 if self.name == "prm" else 1

    def scores(self, sequences: Sequence[TrainingSequence]) -> list[tuple[float, ...]]:
        """The number of every response token, in the order given; no gradient."""
        own = self.learner.logprobs(sequences)
        if self.name == "critic":
            return own
        assert self.learner.reference is not None
        reference = self.learner.logprobs(sequences, self.learner.reference)
        return [
            tuple(a - b for a, b in zip(row, other, strict=True)) for row, other in zip(own, reference, strict=True)
        ]

    @torch.no_grad()
    def restart(self, policy: Policy) -> None:
        """Begin anew from the policy as it is: its weights, a critic's head at zero, no moments, no memory of norms."""
        own, head = self.learner.policy.model, set()
        if self.name == "critic":
            head = set(own.get_output_embeddings().parameters())
        weights = dict(policy.model.named_parameters())
        for name, parameter in own.named_parameters():
            if parameter in head:
                parameter.zero_()
            else:
                parameter.copy_(weights[name])
        self.optimizer.reset()
        self.guard.forget()

    # --- state -------------------------------------------------------------------------------------------------------

    def check(self, what: str) -> None:
        """Refuse weights and moments that are not finite, as `check_state` does."""
        check_state(self.learner.policy.model, {self.name: self.optimizer}, what)

    def tensors(self) -> dict[str, Mapping[str, Tensor]]:
        """The live tensors by component: parameters, moments, and the copy for a rollback where there is one."""
        names = {parameter: name for name, parameter in self.learner.policy.model.named_parameters()}
        components: dict[str, Mapping[str, Tensor]] = {
            self.name: {names[p]: p for p in self.learner.parameters},
            f"{self.name}_optimizer": self.optimizer.state_tensors(),
        }
        if self.guard.good.held:
            components[f"{self.name}_rollback"] = self.guard.good.state_tensors()
        return components

    def state_dict(self) -> dict[str, Any]:
        """What changes with every update, as plain data; the optimizer's part goes with the tensors."""
        return {"guard": self.guard.state_dict(), "micro_batch_tokens": self.learner.micro_batch_tokens}

    def load(
        self, state: Mapping[str, Any], updates: Mapping[str, Any], tensors: Mapping[str, Mapping[str, Tensor]]
    ) -> None:
        """Restore what `state_dict`, the optimizer's `state_dict` and `tensors` gave; the tensors are copied."""
        copy_parameters(self.learner.policy.model, tensors[self.name])
        self.optimizer.load(updates, cloned(tensors.get(f"{self.name}_optimizer", {})))
        self.guard.load_state_dict(state["guard"], cloned(tensors.get(f"{self.name}_rollback", {})))
        self.learner.micro_batch_tokens = state["micro_batch_tokens"]


def make_scorer(
    name: ScorerName,
    policy: Policy,
    config: Config,
    *,
    reference: Policy | None,
    window: Callable[[], AbstractContextManager[None]],
) -> Scorer:
    """The second model of a run that begins, from the policy's weights.

    Args:
        name: which.
        policy: as it was loaded, on its device.
        config: the run's.
        reference: what a "prm" compares with.
        window: where an update may be broken off.

    Raises:
        ModelError: the architecture does not allow it.
    """
    model: PreTrainedModel = critic_model(policy.model) if name == "critic" else copy.deepcopy(policy.model)
    made = (Critic if name == "critic" else Policy)(
        model,
        compute_dtype=policy.compute_dtype,
        layout=policy.layout,  # found out on the policy: a head of zeros would agree with any
        activation_checkpointing=config.model.activation_checkpointing,
    )
    learner = Learner(
        made,
        micro_batch_tokens=config.train.micro_batch_tokens,
        world=current_world(),
        reference=reference,
        window=window,
    )
    settings = config.critic_optimizer if name == "critic" else config.prm_optimizer
    return Scorer(name, learner, ScheduledAdamW(learner.parameters, settings), Guard(config.guard))
