"""The model that KL terms compare with: as it was loaded, or the policy as it was where some phase began (`Phase.reference`).

The first is read from `model.path` at every start, and only its hash is saved; the second is part of checkpoints. Once a policy
was taken the loaded model is gone: the first phase after that which names none takes the policy too.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mifo.train.learner import Learner
from mifo.types import Phase


@torch.no_grad()
def refer(learner: Learner, phase: Phase) -> bool:
    """Take the policy as the reference if the phase names its reference otherwise than the last one; says whether it did.

    Where no term has a reference only the name is kept.
    """
    if phase.reference == learner.reference_name:
        return False
    learner.reference_name = phase.reference
    if learner.reference is not None:
        learner.reference_taken = True
        _copy(dict(learner.policy.model.named_parameters()), learner)
    return True


def reference_tensors(learner: Learner) -> dict[str, Mapping[str, Tensor]]:
    """What a checkpoint needs of the reference: its weights, under "reference"; {} where it is the model as it was loaded."""
    if learner.reference is None or not learner.reference_taken:
        return {}
    return {"reference": dict(learner.reference.model.named_parameters())}


@torch.no_grad()
def load_reference(learner: Learner, name: str | None, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Restore what `reference_tensors` gave, and its name."""
    learner.reference_name, learner.reference_taken = name, "reference" in tensors
    if learner.reference_taken:
        _copy(tensors["reference"], learner)


def _copy(weights: Mapping[str, Tensor], learner: Learner) -> None:
    assert learner.reference is not None
    for name, kept in learner.reference.model.named_parameters():
        kept.copy_(weights[name])
