import statistics

import pytest

from mifo.core.advantages import group_advantages, hybrid_advantages, overlong_reward, step_advantages, whitened


def test_centred_by_hand():
    assert group_advantages([1, 0, 0, 0], divide_by_std=False) == [0.75, -0.25, -0.25, -0.25]


def test_std_is_the_unbiased_one():
    assert group_advantages([1, 0, 0, 0], divide_by_std=True) == pytest.approx([1.5, -0.5, -0.5, -0.5], rel=1e-5)
    biased = 0.75 / 0.4330127
    assert group_advantages([1, 0, 0, 0], divide_by_std=True)[0] != pytest.approx(biased, rel=1e-2)


@pytest.mark.parametrize("rewards", [[0, 0, 0], [1, 1, 1], [0.1, 0.1, 0.1]])
def test_all_equal_groups_are_exact_zeros(rewards):
    for divide in (False, True):
        assert group_advantages(rewards, divide_by_std=divide) == [0.0, 0.0, 0.0]


def test_group_of_one_has_no_baseline():
    assert group_advantages([0.5], divide_by_std=True) == [0.5]


def test_rloo_is_the_reward_less_the_mean_of_the_others():
    rewards = [1.0, 0.0, 0.0, 0.5]
    expected = [r - sum(rewards[:i] + rewards[i + 1 :]) / 3 for i, r in enumerate(rewards)]
    [row] = step_advantages([rewards], [[1, 2, 3, 4]], "rloo")
    assert row == pytest.approx(expected)
    assert step_advantages([[1, 1]], [[1, 2]], "rloo") == [[0.0, 0.0]]


def slow_whitened(values, lengths):
    """Every token written out, then standardised with the unbiased variance."""
    tokens = [v for v, n in zip(values, lengths, strict=True) for _ in range(n)]
    mean = statistics.mean(tokens)
    return [(v - mean) / (statistics.variance(tokens) + 1e-8) ** 0.5 for v in values]


def test_reinforce_whitens_rewards_over_the_tokens_of_the_step():
    rewards, lengths = [[1.0, 0.0], [0.0, 0.0]], [[2, 3], [1, 4]]
    expected = slow_whitened([1.0, 0.0, 0.0, 0.0], [2, 3, 1, 4])
    found = step_advantages(rewards, lengths, "reinforce")
    assert found[0] + found[1] == pytest.approx(expected)
    assert found[0][0] == pytest.approx(0.8 / (1.6 / 9) ** 0.5)  # mean 2/10, Σ(v−m)² = 2·0.64 + 8·0.04
    unweighted = statistics.stdev([1, 0, 0, 0])
    assert found[0][0] != pytest.approx(0.75 / unweighted, rel=1e-2)  # the tempting version counts responses


def test_reinforce_baseline_centres_groups_first():
    rewards, lengths = [[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]], [[2, 3, 1], [5, 1, 1]]
    expected = slow_whitened([2 / 3, -1 / 3, -1 / 3, 0, 0, 0], [2, 3, 1, 5, 1, 1])
    found = step_advantages(rewards, lengths, "reinforce_baseline")
    assert found[0] + found[1] == pytest.approx(expected)
    assert found[1][0] == found[1][1]


@pytest.mark.parametrize("estimator", ["reinforce", "reinforce_baseline", "rloo", "group"])
def test_a_step_without_variance_is_exact_zeros(estimator):
    assert step_advantages([[0.1, 0.1], [0.1, 0.1]], [[1, 2], [3, 4]], estimator) == [[0.0, 0.0], [0.0, 0.0]]


def test_empty_responses_do_not_count():
    [row] = whitened([[1.0, 0.0, 7.0]], [[1, 1, 0]])
    assert row[:2] == pytest.approx(slow_whitened([1.0, 0.0], [1, 1]))
    assert step_advantages([], [], "reinforce") == []


@pytest.mark.parametrize(("length", "expected"), [(5, 0.0), (16, 0.0), (18, -1.0), (20, -2.0)])
def test_overlong_punishment_by_hand(length, expected):
    assert overlong_reward(length, longest=20, margin=4, penalty=2.0) == expected


def test_hybrid_shares_the_mean_of_all():
    pairs = hybrid_advantages([1.0, 0.0, 0.0, 1.0], "shared", divide_by_std=False)
    assert pairs == [(0.5, 0.5), (-0.5, -0.5), (-0.5, -0.5), (0.5, 0.5)]
    scaled = hybrid_advantages([1.0, 0.0, 0.0, 1.0], "shared", divide_by_std=True)
    assert scaled[3][0] == pytest.approx(0.5 / (1 / 3) ** 0.5, rel=1e-5)


@pytest.mark.parametrize(("form", "rest"), [("dr_grpo_prefix", 1.0), ("dr_grpo_prefix_v2", 0.0)])
def test_hybrid_with_a_baseline_of_the_plain_rollouts(form, rest):
    pairs = hybrid_advantages([1.0, 0.0, 0.0, 1.0], form, divide_by_std=False)
    assert pairs[:3] == [(pytest.approx(2 / 3),) * 2] + [(pytest.approx(-1 / 3),) * 2] * 2
    assert pairs[3] == (pytest.approx(2 / 3), rest)  # the mean of all four would make it 1/2
    assert hybrid_advantages([1.0, 1.0, 0.0], form, divide_by_std=False) == [(0.0, 0.0), (0.0, 0.0), (-1.0, 0.0)]
