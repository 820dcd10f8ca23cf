"""The data flow of each method on scripted groups: what enters an update, when phases change, what may move."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mifo.config.decode import decode
from mifo.config.schema import Config
from mifo.core.losses import CrossEntropy, EntropyBonus, KlToReference, PolicyGradient
from mifo.methods import METHODS, make_method
from mifo.types import Freeze, Group, Message, Problem, Rollout, Verdict


def group(name, correct, *, of=8, demonstration=True, length=3):
    verdicts = tuple(Verdict.CORRECT if i < correct else Verdict.WRONG for i in range(of))
    return Group(
        problem=Problem(id=name, messages=(Message("user", name),), answer="1"),
        prompt_ids=(1, 2),
        rollouts=tuple(
            Rollout(token_ids=(5,) * (length + i), logprobs=(-1.0,) * (length + i), stop="stop", weight_version=3)
            for i in range(of)
        ),
        verdicts=verdicts,
        rewards=tuple(float(v is Verdict.CORRECT) for v in verdicts),
        demonstration_ids=(7, 8, 9) if demonstration else None,
    )


def method(**settings):
    rl = {"prompts_per_step": 2, "updates_per_step": 1, **settings.pop("rl", {})}
    return make_method(decode(Config, {"method": {"name": "mifo", "buffer_size": 3, "rl": rl, **settings}}))


def test_every_method_of_the_union_is_registered():
    import typing

    from mifo.config import schema

    tags = {member.__dataclass_fields__["name"].default for member in typing.get_args(schema.MethodConfig)}
    assert tags == set(METHODS)


def test_threshold_takes_questions_with_at_most_p():
    mifo = method(buffer_size=100)
    phase = mifo.next_phase()
    mifo.updates(phase, [group("none", 0), group("one", 1), group("two", 2), group("all", 8)])
    assert [d.problem_id for d in mifo.buffer] == ["none", "one"]
    [demo, _] = mifo.buffer
    assert (demo.prompt_ids, demo.response_ids) == ((1, 2), (7, 8, 9))


def test_questions_without_a_verified_demonstration_do_not_enter():
    mifo = method()
    mifo.updates(mifo.next_phase(), [group("a", 0, demonstration=False), group("b", 0)])
    assert [d.problem_id for d in mifo.buffer] == ["b"]


def test_phases_switch_after_the_step_that_fills_the_buffer_and_when_it_is_empty():
    mifo = method(sft_batch_size=2)
    assert mifo.next_phase().name == "rl"
    mifo.updates(mifo.next_phase(), [group("a", 0), group("b", 0)])
    assert mifo.next_phase().name == "rl"
    mifo.updates(mifo.next_phase(), [group("b", 0), group("c", 0)])  # b is already waiting
    phase = mifo.next_phase()
    assert (phase.name, phase.optimizer, phase.prompts) == ("sft", "sft", 0)
    assert phase.freeze == Freeze(top=0.5, history=0.5)
    [first] = mifo.updates(phase, ())
    assert [s.problem_id for s in first.sequences] == ["a", "b"]
    assert mifo.next_phase().name == "sft"
    [second] = mifo.updates(phase, ())
    assert [s.problem_id for s in second.sequences] == ["c"]
    assert mifo.next_phase().name == "rl"
    assert len(mifo.buffer) == 0


def test_the_whole_buffer_is_one_update_by_default_overshoot_included():
    mifo = method()
    mifo.updates(mifo.next_phase(), [group(n, 0) for n in "abcde"])
    [update] = mifo.updates(mifo.next_phase(), ())
    assert len(update.sequences) == 5
    [term] = update.terms
    assert isinstance(term.loss, CrossEntropy)
    assert (term.select.fraction, term.denominator, term.normalizer) == (0.2, "all", "token")


def test_ablations_are_settings():
    interleave = method(token_fraction=1.0, freeze_top=0.0)
    interleave.updates(interleave.next_phase(), [group(n, 0) for n in "abc"])
    phase = interleave.next_phase()
    assert phase.freeze is None
    assert interleave.freeze is None
    [update] = interleave.updates(phase, ())
    assert update.terms[0].select is None
    dagger = method(history=0.0)
    assert dagger.freeze.history == 0.0


def test_shared_optimizer():
    mifo = method(optimizers="shared")
    mifo.updates(mifo.next_phase(), [group(n, 0) for n in "abc"])
    assert mifo.next_phase().optimizer == "rl"


def test_state_survives_in_the_middle_of_an_sft_phase():
    first = method(sft_batch_size=2)
    first.updates(first.next_phase(), [group(n, 0) for n in "abc"])
    first.updates(first.next_phase(), ())
    second = method(sft_batch_size=2)
    second.load_state_dict(first.state_dict())
    assert second.next_phase() == first.next_phase()
    assert [s.problem_id for s in second.updates(second.next_phase(), ())[0].sequences] == ["c"]


def test_policy_gradient_update_by_hand():
    rl = {"prompts_per_step": 2, "updates_per_step": 1}
    grpo = make_method(decode(Config, {"method": {"name": "grpo", "rl": rl}}))
    [update] = grpo.updates(grpo.next_phase(), [group("a", 2), group("b", 8)])
    assert [s.weights["pg"] for s in update.sequences[:3]] == [0.75, 0.75, -0.25]
    assert {s.weights["pg"] for s in update.sequences[8:]} == {0.0}
    assert update.sequences[0].weights["ent"] == 1.0
    assert update.sequences[0].weight_version == 3
    pg, ent = update.terms
    assert pg.loss == PolicyGradient(0.2, 0.2, None)
    assert pg.uses_old_policy
    assert isinstance(ent.loss, EntropyBonus)
    assert ent.coefficient == 0.001


def test_switches_of_grpo_reach_the_terms():
    rl = {
        "prompts_per_step": 2,
        "updates_per_step": 2,
        "advantage_std": True,
        "normalizer": "constant",
        "clip_low": 0.1,
        "clip_high": 0.28,
        "dual_clip": 3.0,
        "kl_coefficient": 0.04,
        "entropy_coefficient": 0.0,
    }
    grpo = make_method(decode(Config, {"method": {"name": "grpo", "rl": rl}, "rollout": {"max_response_tokens": 77}}))
    updates = grpo.updates(grpo.next_phase(), [group("a", 4), group("b", 4)])
    assert [len(u.sequences) for u in updates] == [8, 8]
    pg, kl = updates[0].terms
    assert (pg.loss, pg.normalizer, pg.constant_tokens) == (PolicyGradient(0.1, 0.28, 3.0), "constant", 77)
    assert isinstance(kl.loss, KlToReference)
    assert (kl.coefficient, kl.uses_reference) == (0.04, True)
    assert updates[0].sequences[0].weights["pg"] == pytest.approx(0.5 / (2 / 7) ** 0.5, rel=1e-5)


def test_sft_learns_demonstrations_without_rollouts():
    sft = make_method(decode(Config, {"method": {"name": "sft", "batch_size": 5}}))
    phase = sft.next_phase()
    assert (phase.name, phase.prompts, phase.rollouts) == ("sft", 5, 0)
    assert sft.needs_demonstrations
    [update] = sft.updates(phase, [group("a", 0), group("b", 0)])
    assert [s.response_ids for s in update.sequences] == [(7, 8, 9), (7, 8, 9)]


@given(st.lists(st.integers(0, 8), min_size=2, max_size=12))
def test_every_rollout_enters_exactly_one_update(correct):
    size = len(correct) - len(correct) % 2
    grpo = make_method(
        decode(Config, {"method": {"name": "grpo", "rl": {"prompts_per_step": size, "updates_per_step": 2}}})
    )
    groups = [group(str(i), c) for i, c in enumerate(correct[:size])]
    updates = grpo.updates(grpo.next_phase(), groups)
    entered = [s.response_ids for u in updates for s in u.sequences]
    assert entered == [r.token_ids for g in groups for r in g.rollouts]
