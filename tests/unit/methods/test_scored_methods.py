"""The data flow of PPO and PRIME on scripted groups: what the second model is to learn, and what the policy is."""

from dataclasses import replace

import pytest
from test_methods import group

from mifo.config.decode import decode
from mifo.config.schema import Config
from mifo.core.critic import ClippedValue
from mifo.core.losses import PolicyGradient
from mifo.core.process_reward import OutcomeCrossEntropy
from mifo.methods import METHODS, make_method
from mifo.methods.scored import split
from mifo.types import Resample, Verdict


def scored_method(name, *, longest=20, rl=(), **settings):
    rl = {"prompts_per_step": 2, "updates_per_step": 1, "entropy_coefficient": 0.0, **dict(rl)}
    tables = {"method": {"name": name, "rl": rl, **settings}, "rollout": {"max_response_tokens": longest}}
    return make_method(decode(Config, tables))


def scored(name, correct, value, *, of=2):
    """A group whose i-th rollout has 3 + i tokens, each of score `value` + i."""
    made = group(name, correct, of=of)
    return replace(made, scores=tuple((value + i,) * (3 + i) for i in range(of)))


def test_only_these_methods_have_a_second_model():
    found = {name: make_method(decode(Config, {"method": {"name": name}})).scorer for name in METHODS}
    assert {name: scorer for name, scorer in found.items() if scorer is not None} == {"ppo": "critic", "prime": "prm"}


def test_ppo_s_phase_asks_for_values():
    phase = scored_method("ppo").next_phase()
    assert (phase.name, phase.prompts, phase.rollouts, phase.scorer_learns) == ("rl", 2, 8, "after")


def test_ppo_s_advantages_stand_at_tokens():
    """γ = λ = 1, no whitening: reward less value; rewards 1 and 0, values ½ and 1½."""
    method = scored_method("ppo", whiten=False)
    [update] = method.updates(method.next_phase(), [scored("a", 1, 0.5)])
    assert [s.weights for s in update.sequences] == [{"pg": (0.5,) * 3}, {"pg": (-1.5,) * 4}]
    assert all(s.sampler_logprobs is not None and s.target is None for s in update.sequences)
    assert update.terms[0].loss == PolicyGradient(0.2, 0.2)
    assert (update.terms[0].normalizer, update.terms[0].uses_old_policy) == ("token", True)


def test_ppo_whitens_over_the_tokens_of_the_whole_step_though_they_enter_two_updates():
    method = scored_method("ppo", rl={"updates_per_step": 2})
    first, second = method.updates(method.next_phase(), [scored("a", 1, 0.5), scored("b", 0, 0.0)])
    tokens = [a for u in (first, second) for s in u.sequences for a in s.weights["pg"]]
    assert sum(tokens) == pytest.approx(0.0, abs=1e-9)
    assert sum(a * a for a in tokens) / (len(tokens) - 1) == pytest.approx(1.0)
    assert {s.problem_id for s in first.sequences} == {"a"}


def test_the_critic_learns_returns_from_its_old_values():
    method = scored_method("ppo", discount=0.5, gae_lambda=0.0, value_clip=0.2, critic_updates_per_step=1)
    [update] = method.scorer_updates(method.next_phase(), [scored("a", 1, 0.5)])
    [term] = update.terms
    assert term.loss == ClippedValue(0.2)
    assert (term.normalizer, term.uses_old_policy, term.uses_target) == ("token", True, True)
    assert update.old_logprobs == ((0.5,) * 3, (1.5,) * 4)
    assert update.sequences[0].target == pytest.approx((0.25, 0.25, 1.0))  # λ = 0: the next value, discounted
    assert update.sequences[1].target == pytest.approx((0.75, 0.75, 0.75, 0.0))
    assert all(s.weights == {"value": 1.0} and s.sampler_logprobs is None for s in update.sequences)


def test_critic_updates_share_the_rollouts_in_order():
    method = scored_method("ppo", critic_updates_per_step=3)
    updates = method.scorer_updates(method.next_phase(), [scored("a", 1, 0.5), scored("b", 0, 0.0)])
    assert [[(s.problem_id, s.rollout) for s in u.sequences] for u in updates] == [
        [("a", 0)], [("a", 1)], [("b", 0), ("b", 1)]
    ]  # fmt: skip
    assert [len(u.old_logprobs) for u in updates] == [1, 1, 2]


@pytest.mark.parametrize(("count", "updates"), [(0, 3), (1, 3), (9, 6), (8192, 12), (7, 1)])
def test_parts_hold_everything_once_and_differ_by_one(count, updates):
    parts = split(count, updates)
    assert [i for part in parts for i in range(count)[part]] == list(range(count))
    sizes = {part.stop - part.start for part in parts}
    assert len(parts) == min(count, updates)
    assert not sizes or max(sizes) - min(sizes) <= 1


def test_the_critic_warms_up_alone():
    method = scored_method("ppo", critic_warmup_steps=2)
    counts = []
    for _ in range(3):
        phase, groups = method.next_phase(), [scored("a", 1, 0.5)]
        assert method.scorer_updates(phase, groups)
        counts.append(len(method.updates(phase, groups)))
    assert counts == [0, 0, 1]
    again = scored_method("ppo", critic_warmup_steps=2)
    again.load_state_dict({"step": 1})
    assert (again.updates(phase, groups), len(again.updates(phase, groups))) == ([], 1)


def test_asking_what_the_critic_learns_changes_nothing():
    method = scored_method("ppo", critic_warmup_steps=1)
    before = method.state_dict()
    assert method.scorer_updates(None, [scored("a", 1, 0.5)]) == method.scorer_updates(None, [scored("a", 1, 0.5)])
    assert method.state_dict() == before


def test_ppo_shapes_rewards_and_leaves_groups_out_for_both_models():
    rl = {"overlong_tokens": 2, "dynamic_sampling": True}
    method = scored_method("ppo", longest=4, whiten=False, rl=rl)
    groups = [scored("none", 0, 0.0), scored("a", 1, 0.0)]
    [update] = method.updates(method.next_phase(), groups)
    assert [s.weights["pg"][0] for s in update.sequences] == [0.5, -2.0]  # 1 − ½ − 0, 0 − 1 − 1
    learned = method.scorer_updates(method.next_phase(), groups)
    assert {s.problem_id for u in learned for s in u.sequences} == {"a"}


def test_ppo_without_groups_makes_nothing():
    method = scored_method("ppo")
    assert method.updates(method.next_phase(), ()) == method.scorer_updates(method.next_phase(), ()) == []


@pytest.mark.parametrize("update", ["after", "before"])
def test_prime_s_phase(update):
    method = scored_method("prime", prm_update=update)
    assert method.next_phase().scorer_learns == update
    assert method.needs_reference
    assert method.next_phase().resample is None


def test_prime_samples_until_enough_questions_are_neither_hard_nor_easy():
    method = scored_method("prime", rl={"dynamic_sampling": True}, least_accuracy=0.25, most_accuracy=0.5)
    resample = method.next_phase().resample
    assert resample == Resample(groups=2, rounds=10, accuracy=(0.25, 0.5))
    kept = [resample.keeps(group("a", n, of=8)) for n in range(9)]
    assert kept == [False, False, True, True, True, False, False, False, False]
    groups = [replace(group(n, c, of=8), scores=((0.1,),) * 8) for n, c in (("a", 1), ("b", 2), ("c", 4), ("d", 3))]
    groups = [replace(g, scores=tuple((0.1,) * len(r.token_ids) for r in g.rollouts)) for g in groups]
    [update] = method.updates(method.next_phase(), groups)
    assert [s.problem_id for s in update.sequences[::8]] == ["b", "c"]


def test_prime_leaves_hard_and_easy_questions_out_for_both_models():
    groups = [scored(str(c), c, 0.1, of=4) for c in range(5)]
    method = scored_method("prime")
    [update] = method.updates(method.next_phase(), groups)
    [lesson] = method.scorer_updates(method.next_phase(), groups)
    for made in (update, lesson):
        assert [s.problem_id for s in made.sequences[::4]] == ["1", "2", "3"]
    assert (
        scored_method("prime").updates(None, groups[:1])
        == scored_method("prime").scorer_updates(None, groups[:1])
        == []
    )


def test_prime_s_advantages_are_those_of_the_core():
    """N = 2, q = v and v + 1: the other's token mean is taken from each; see the core's tests for the rest."""
    method = scored_method("prime", whiten=False, dense_norm="none", dense_coefficient=2.0)
    [update] = method.updates(method.next_phase(), [scored("a", 1, 0.5)])
    first, second = (s.weights["pg"] for s in update.sequences)
    assert first == pytest.approx([1 - 2 * 3, 1 - 2 * 2, 1 - 2 * 1])
    assert second == pytest.approx([-1 + 2 * 4, -1 + 2 * 3, -1 + 2 * 2, -1 + 2 * 1])


def test_the_reward_model_learns_verdicts_and_guesses_none():
    made = scored("a", 2, 0.1, of=4)
    made = replace(made, verdicts=(Verdict.CORRECT, Verdict.TIMEOUT, Verdict.WRONG, Verdict.CORRECT), scores=None)
    method = scored_method("prime", beta=0.1, prm_updates_per_step=2, prm_update="before")
    updates = method.scorer_updates(method.next_phase(), [made])
    assert [[(s.rollout, s.target) for s in u.sequences] for u in updates] == [[(0, 1.0)], [(2, 0.0), (3, 1.0)]]
    [term] = updates[0].terms
    assert term.loss == OutcomeCrossEntropy(0.1)
    assert (term.normalizer, term.uses_reference, term.uses_target) == ("sequence", True, True)
    assert updates[0].old_logprobs is None
