"""What each switch of the policy gradient puts into an update; and MIFO with any of them."""

import pytest
from test_methods import group

from mifo.config.decode import decode
from mifo.config.schema import Config
from mifo.core.imitation import DynamicFineTuning
from mifo.core.losses import PolicyGradient
from mifo.methods import make_method
from mifo.types import Resample


def rl_method(name="grpo", *, longest=20, **rl):
    rl = {"prompts_per_step": 2, "updates_per_step": 1, "entropy_coefficient": 0.0, **rl}
    return make_method(
        decode(Config, {"method": {"name": name, "rl": rl}, "rollout": {"max_response_tokens": longest}})
    )


def advantages(method, groups):
    return [s.weights["pg"] for u in method.updates(method.next_phase(), groups) for s in u.sequences]


def test_rloo():
    found = advantages(rl_method(advantage="rloo"), [group("a", 2, of=4), group("b", 4, of=4)])
    assert found == pytest.approx([2 / 3, 2 / 3, -2 / 3, -2 / 3, 0, 0, 0, 0])


def test_reinforce_sees_all_groups_of_the_step_though_they_enter_two_updates():
    method = rl_method(advantage="reinforce", updates_per_step=2)
    groups = [group("a", 0, of=2), group("b", 2, of=2)]  # 3 + 4 tokens of reward 0, 3 + 4 of reward 1
    deviation = (14 * 0.25 / 13) ** 0.5
    assert advantages(method, groups) == pytest.approx([-0.5 / deviation] * 2 + [0.5 / deviation] * 2)
    assert [len(u.sequences) for u in method.updates(method.next_phase(), groups)] == [2, 2]


def test_overlong_shaping_lowers_rewards_before_advantages_are_made():
    """Lengths 3 to 6 of at most 6; the last 2 tokens are punished: 0, 0, −½, −1."""
    method = rl_method(longest=6, overlong_tokens=2)
    assert advantages(method, [group("a", 4, of=4)]) == pytest.approx([0.375, 0.375, -0.125, -0.625])
    assert advantages(rl_method(longest=6), [group("a", 4, of=4)]) == [0.0] * 4


def test_ratio_and_clip_reach_the_loss():
    [update] = rl_method(ratio="sequence", clip_low=3e-4, clip_high=4e-4).updates(None, [group("a", 2)])
    assert update.terms[0].loss == PolicyGradient(3e-4, 4e-4, ratio="sequence")
    [update] = rl_method(clip="weight", clip_low=None).updates(None, [group("a", 2)])
    assert update.terms[0].loss == PolicyGradient(None, 0.2, clip="weight")


@pytest.mark.parametrize("name", ["grpo", "mifo"])
def test_dynamic_sampling_asks_for_rounds_of_prompts(name):
    phase = rl_method(name, dynamic_sampling=True, dynamic_prompts=6, dynamic_rounds=3).next_phase()
    assert (phase.prompts, phase.rollouts, phase.resample) == (6, 8, Resample(groups=2, rounds=3))
    assert rl_method(name, dynamic_sampling=True).next_phase().prompts == 2
    assert rl_method(name).next_phase().resample is None


def test_dynamic_sampling_learns_from_the_first_mixed_groups_only():
    method = rl_method(dynamic_sampling=True)
    groups = [group("none", 0), group("a", 1), group("all", 8), group("b", 7), group("c", 4)]
    [update] = method.updates(method.next_phase(), groups)
    assert [s.problem_id for s in update.sequences[::8]] == ["a", "b"]
    assert len(update.sequences) == 16  # the denominator is that of the two groups


def test_mixed_means_correct_and_not_whatever_the_shaped_reward():
    """All correct, of different lengths: shaping makes rewards differ, but there is nothing to prefer by verdict."""
    method = rl_method(longest=6, overlong_tokens=2, dynamic_sampling=True)
    assert method.updates(method.next_phase(), [group("a", 4, of=4)]) == []


@pytest.mark.parametrize(("mixed", "sizes"), [(0, []), (1, [1]), (3, [2, 1]), (4, [2, 2]), (6, [2, 2])])
def test_fewer_groups_than_wanted_make_smaller_updates_never_more(mixed, sizes):
    method = rl_method(dynamic_sampling=True, prompts_per_step=4, updates_per_step=2)
    groups = [group(str(i), 4) for i in range(mixed)]
    assert [len(u.sequences) // 8 for u in method.updates(method.next_phase(), groups)] == sizes


def test_mifo_s_buffer_sees_the_groups_that_dynamic_sampling_leaves_out():
    mifo = rl_method("mifo", dynamic_sampling=True)
    [update] = mifo.updates(mifo.next_phase(), [group("none", 0), group("a", 4), group("all", 8), group("b", 4)])
    assert [d.problem_id for d in mifo.buffer] == ["none"]
    assert [s.problem_id for s in update.sequences[::8]] == ["a", "b"]


def sft_method(**sft):
    return make_method(decode(Config, {"method": {"name": "sft", "sft": sft, "batch_size": 5}}))


@pytest.mark.parametrize("loss", ["cross_entropy", "dft", "gem", "psft", "asft", "eaft", "chord_phi"])
def test_every_imitation_loss_enters_sft_and_mifo_with_selection_and_denominators_unchanged(loss):
    sft = {"loss": loss, "updates_per_batch": 2}
    config = {"method": {"name": "mifo", "buffer_size": 2, "sft": sft}}
    mifo = make_method(decode(Config, config))
    assert mifo.needs_reference == sft_method(**sft).needs_reference == (loss == "asft")
    mifo.updates(mifo.next_phase(), [group("a", 0), group("b", 0)])
    first, second = mifo.updates(mifo.next_phase(), ())
    for update in (first, second):
        [term] = update.terms
        assert (term.name, term.select.fraction, term.denominator) == ("ce", 0.2, "all")
        assert term.uses_old_policy == (loss == "psft")
        assert (term.vocabulary is not None) == (loss in ("gem", "asft", "eaft"))
    assert [s.problem_id for u in (first, second) for s in u.sequences] == ["a", "b"]
    assert not mifo.learning


def test_a_batch_is_split_in_order():
    sft = sft_method(updates_per_batch=2, loss="dft")
    updates = sft.updates(sft.next_phase(), [group(n, 0) for n in "abcde"])
    assert [[s.problem_id for s in u.sequences] for u in updates] == [["a", "b", "c"], ["d", "e"]]
    assert updates[0].terms[0].loss == DynamicFineTuning()
