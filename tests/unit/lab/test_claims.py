"""The one rule from an interval to a verdict."""

import math

import pytest

from mifo.lab.arena_statistics import Estimate, paired_difference
from mifo.lab.claims import Claim, over_seeds, overall, ratio_over_seeds


def claim(low, high, *, side="above", bound=0.0, margin=0.0, seeds=3):
    found = Estimate(value=(low + high) / 2, low=low, high=high, seeds=seeds, problems=1)
    return Claim(text="", paper="", unit="points", side=side, bound=bound, margin=margin, measured=found)


@pytest.mark.parametrize(
    ("side", "bound", "margin", "low", "high", "verdict"),
    [
        ("above", 0.0, 0.0, 0.01, 0.2, "reproduces"),
        ("above", 0.0, 0.0, -0.01, 0.2, "cannot be told"),
        ("above", 0.0, 0.0, -0.2, -0.01, "does not"),
        ("above", -0.02, 0.0, -0.01, 0.2, "reproduces"),
        ("above", -0.02, 0.0, -0.2, -0.03, "does not"),
        ("below", 1.0, 0.0, 0.5, 0.9, "reproduces"),
        ("below", 1.0, 0.0, 0.5, 1.1, "cannot be told"),
        ("below", 1.0, 0.0, 1.1, 1.2, "does not"),
        ("within", 0.0, 0.05, -0.04, 0.04, "reproduces"),
        ("within", 0.0, 0.05, -0.04, 0.06, "cannot be told"),
        ("within", 0.0, 0.05, 0.06, 0.2, "does not"),
        ("within", 0.0, 0.05, -0.2, -0.06, "does not"),
        ("above", 0.0, 0.0, 0.0, 0.2, "cannot be told"),
    ],
)
def test_the_interval_decides(side, bound, margin, low, high, verdict):
    assert claim(low, high, side=side, bound=bound, margin=margin).verdict == verdict


def test_one_seed_and_intervals_without_width_decide_nothing():
    assert claim(0.1, 0.2, seeds=1).verdict == "cannot be told"
    assert claim(0.1, 0.1).verdict == "cannot be told"
    for figure in (0.1, 0.05, -0.0125, 0.7):  # their mean is not always the same number again
        assert over_seeds(dict.fromkeys(range(3), figure)).certain
    assert not claim(0.1, 0.1 + 1e-6).measured.certain
    assert Claim(text="", paper="", unit="points", side="above").verdict == "cannot be told"


def test_a_finding_reproduces_only_where_all_its_claims_do():
    yes, no, open_ = claim(0.1, 0.2), claim(-0.2, -0.1), claim(-0.1, 0.1)
    assert overall([yes, yes]) == "reproduces"
    assert overall([yes, open_]) == "cannot be told"
    assert overall([yes, open_, no]) == "does not"
    assert overall([]) == "cannot be told"


def test_figures_of_seeds_and_their_ratios():
    found = over_seeds({0: 1.0, 1: 3.0})
    assert found.value == 2.0
    assert found.seeds == 2
    # a resampled mean is 1, 2 or 3, and the distance from 2 is widened by 9.17: √2 · t/z with t = 12.7 for one degree of freedom
    assert (found.low, found.high) == pytest.approx((2 - 9.17, 2 + 9.17), abs=0.01)
    ratios = ratio_over_seeds({0: 2.0, 1: 8.0, 2: 4.0})
    assert ratios.value == pytest.approx(4.0)  # the geometric mean; the arithmetic one is 4.67
    assert ratios.low * ratios.high == pytest.approx(16.0, rel=1e-6)  # symmetric in logarithms
    assert over_seeds({}) is None
    assert ratio_over_seeds({0: 0.0}) is None
    assert math.isclose(ratio_over_seeds({0: 2.0, 1: 0.0}).value, 2.0)


def test_seeds_that_agree_decide_nothing():
    """Both seeds lose the same six problems of thirteen: the interval over problems has a width, the seeds have no spread."""
    runs = {seed: {f"p{i}": float(i < 6) for i in range(13)} for seed in range(2)}
    found = paired_difference(runs, {seed: dict.fromkeys(runs[0], 0.0) for seed in range(2)})
    assert found.low > 0.0
    assert found.seeds_agree
    decided = Claim(text="", paper="", unit="points", side="above", measured=found)
    assert decided.verdict == "cannot be told"
    other = {**runs, 1: {f"p{i}": float(i < 7) for i in range(13)}}
    assert not paired_difference(other, {seed: dict.fromkeys(runs[0], 0.0) for seed in range(2)}).seeds_agree
