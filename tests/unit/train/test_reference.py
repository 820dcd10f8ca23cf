"""What KL terms compare with: the loaded model, or the policy as a phase found it; and what a checkpoint keeps of it."""

import pytest
import torch

from mifo.train.learner import Learner
from mifo.train.model import tiny_model
from mifo.train.policy import Policy
from mifo.train.reference import load_reference, refer, reference_tensors
from mifo.types import Phase


def learner_of(*, with_reference=True):
    reference = Policy(tiny_model(seed=0, hidden=32).requires_grad_(False)) if with_reference else None
    return Learner(Policy(tiny_model(seed=0, hidden=32)), micro_batch_tokens=100, reference=reference)


def phase(name):
    return Phase(name="rl", optimizer="rl", reference=name)


@torch.no_grad()
def move(learner):
    for parameter in learner.parameters:
        parameter.add_(0.01)


def same(learner):
    """Whether reference and policy have the same weights."""
    pairs = zip(learner.reference.model.parameters(), learner.policy.model.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_the_loaded_model_is_kept_until_a_phase_names_another():
    learner = learner_of()
    move(learner)
    assert not refer(learner, phase(None))
    assert not same(learner)
    assert reference_tensors(learner) == {}
    assert refer(learner, phase("warm"))
    assert same(learner)
    move(learner)
    assert not refer(learner, phase("warm"))  # of the same name again: it stays as it was
    assert not same(learner)
    assert refer(learner, phase("other"))
    assert same(learner)


def test_a_phase_without_a_name_after_one_with_a_name_takes_the_policy():
    learner = learner_of()
    refer(learner, phase("warm"))
    move(learner)
    assert refer(learner, phase(None))
    assert same(learner)
    assert "reference" in reference_tensors(learner)


@pytest.mark.parametrize("names", [(None,), ("warm",), ("warm", None)])
def test_a_checkpoint_brings_it_back(names):
    first, second = learner_of(), learner_of()
    for name in names:
        move(first)
        refer(first, phase(name))
    kept = reference_tensors(first)
    move(first)
    load_reference(second, first.reference_name, kept)
    assert second.reference_name == first.reference_name
    assert reference_tensors(second).keys() == kept.keys()
    pairs = zip(first.reference.model.parameters(), second.reference.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_without_a_reference_only_the_name_is_kept():
    learner = learner_of(with_reference=False)
    assert [refer(learner, phase(name)) for name in ("warm", "warm", None)] == [True, False, True]
    assert reference_tensors(learner) == {}
