import math

import pytest

from mifo.core.intervals import mean_interval, paired_interval, wilson


def test_wilson_by_hand():
    interval = wilson(8, 10)  # Brown, Cai, DasGupta 2001: [0.490, 0.943]
    assert (interval.value, interval.count) == (0.8, 10)
    assert (interval.low, interval.high) == (pytest.approx(0.490, abs=5e-4), pytest.approx(0.943, abs=5e-4))


@pytest.mark.parametrize("trials", [1, 20, 500])
def test_wilson_stays_sensible_at_the_ends(trials):
    none, every = wilson(0, trials), wilson(trials, trials)
    assert none.low == 0.0 < none.high < 1.0
    assert 0.0 < every.low < every.high == 1.0


def test_mean_of_several_samples_uses_problem_scores():
    scores = [0.0, 0.5, 1.0, 0.5]
    interval = mean_interval(scores, samples=2)
    half = 1.96 * (0.5 / 3) ** 0.5 / 2
    assert interval.value == 0.5
    assert (interval.low, interval.high) == (pytest.approx(0.5 - half, abs=1e-3), pytest.approx(0.5 + half, abs=1e-3))
    assert mean_interval([0.0, 1.0], samples=1) == wilson(1, 2)


@pytest.mark.parametrize("share", [0.0, 1.0, 0.5])
def test_equal_scores_do_not_make_a_certainty(share):
    interval = mean_interval([share] * 10, samples=4)
    assert interval == wilson(10 * share, 10)
    assert interval.low < interval.high


def test_a_change_is_paired_by_problem():
    """Three of eight won, one lost: mean 0.25, deviation √(3.5/7)."""
    before, after = [0, 0, 0, 1, 1, 1, 0, 0], [1, 1, 1, 0, 1, 1, 0, 0]
    found = paired_interval(before, after)
    assert (found.value, found.count) == (0.25, 8)
    assert found.high - 0.25 == pytest.approx(1.959964 * math.sqrt(0.5 / 8), rel=1e-6)
    same = paired_interval([1, 0, 1], [1, 0, 1])
    assert (same.value, same.low, same.high) == (0.0, -wilson(0, 3).high, wilson(0, 3).high)
