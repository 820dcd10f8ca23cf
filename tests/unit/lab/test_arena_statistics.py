"""Means, intervals and paired differences against slow oracles, and coverage where the truth is known."""

import numpy as np
import pytest

from mifo.lab import arena_statistics
from mifo.lab.arena_statistics import (
    DRAWS,
    interval,
    paired_difference,
    score_table,
    share_interval,
    shared_problems,
    student_quantile,
    widening,
)


def test_student_quantiles_are_those_of_the_tables():
    known = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 30: 2.042, 1000: 1.962}
    for degrees, value in known.items():
        assert student_quantile(degrees) == pytest.approx(value, abs=1e-3)


def test_widening_by_hand():
    assert widening(3) == pytest.approx((3 / 2) ** 0.5 * 4.3027 / 1.95996, rel=1e-4)
    assert widening(1) == 0.0
    assert widening(2) > widening(3) > widening(10) > widening(1000) > 1.0


def test_a_mean_by_hand():
    found = interval(np.array([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0]]))
    assert found.value == 0.5
    assert (found.seeds, found.problems) == (2, 3)
    assert found.low < 0.5 < found.high


def slow_interval(table, counts_of_seeds, counts_of_problems):
    """The same draws, one by one, from lists of the resampled rows and columns."""
    seeds, problems = table.shape
    mean, draws = table.mean(), []
    for s, p in zip(counts_of_seeds, counts_of_problems, strict=True):
        rows = [i for i in range(seeds) for _ in range(round(s[i] * seeds))]
        columns = [j for j in range(problems) for _ in range(round(p[j] * problems))]
        assert (len(rows), len(columns)) == (seeds, problems)
        by_seed = sum(table[i].mean() for i in rows) / seeds - mean
        by_problem = sum(table[:, j].mean() for j in columns) / problems - mean
        draws.append(mean + widening(seeds) * by_seed + by_problem)
    return np.quantile(draws, [0.025, 0.975])


def test_the_bootstrap_is_that_of_its_definition():
    table = np.random.default_rng(1).random((3, 7))
    low, high = slow_interval(table, arena_statistics._counts(3, 0), arena_statistics._counts(7, 1))
    found = interval(table)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-12), pytest.approx(high, abs=1e-12))


def test_the_same_scores_give_the_same_interval_however_they_come():
    table = np.random.default_rng(2).random((4, 9))
    assert interval(table) == interval(table.copy())
    arena_statistics._counts.cache_clear()
    again = interval(table)
    assert again == interval(table)
    assert len(arena_statistics._counts(9, 1)) == DRAWS


def test_one_seed_is_uncertain_by_its_problems_alone():
    scores = np.array([[0.0, 1.0, 1.0, 0.0, 1.0]])
    found = interval(scores)
    assert found.seeds == 1
    spread = found.high - found.low
    assert spread == pytest.approx(2 * 1.96 * (scores.var() / 5) ** 0.5, rel=0.15)
    assert interval(np.full((1, 6), 0.5)).low == interval(np.full((1, 6), 0.5)).high == 0.5


def test_one_column_is_a_figure_of_each_run():
    found = interval(np.array([[10.0], [12.0], [14.0]]))
    assert found.value == 12.0
    draws = [10.0, 14.0]  # three equal seeds, the rarest resample, has a chance of 1/27
    assert found.low == pytest.approx(12 - widening(3) * (12 - min(draws)))
    assert found.high == pytest.approx(12 + widening(3) * (max(draws) - 12))


def test_shares_stay_shares():
    found = share_interval(np.array([[1.0, 1.0, 1.0], [0.0, 0.0, 1.0]]))
    assert found.low == 0.0
    assert found.high == 1.0
    wide = interval(np.array([[1.0, 1.0, 1.0], [0.0, 0.0, 1.0]]))
    assert wide.low < 0.0
    assert wide.high > 1.0


def test_equal_scores_do_not_make_a_certainty():
    found = share_interval(np.zeros((2, 7)))
    assert found.low == 0.0
    assert found.high == pytest.approx(0.354, abs=1e-3)  # Wilson, none of seven
    assert share_interval(np.ones((1, 7))).low == pytest.approx(1 - 0.354, abs=1e-3)
    same = paired_difference(runs_of(np.eye(3)), runs_of(np.eye(3)))
    assert same.value == 0.0
    assert not same.excludes_zero
    assert -1.0 <= same.low < -0.3 < 0.3 < same.high <= 1.0


def runs_of(table):
    return {seed: {f"p{j}": float(x) for j, x in enumerate(row)} for seed, row in enumerate(table)}


def test_tables_follow_the_order_asked_for():
    runs = {3: {"a": 1.0, "b": 0.0}, 1: {"b": 1.0, "a": 0.0}}
    assert score_table(runs, [1, 3], ["a", "b"]).tolist() == [[0.0, 1.0], [1.0, 0.0]]
    assert shared_problems([runs, {0: {"a": 1.0, "c": 0.0}}]) == ["a"]
    assert shared_problems([]) == []


def test_pairing_takes_out_what_two_methods_share():
    """Hard problems and lucky seeds move both methods alike: the paired interval does not see them, an unpaired one does."""
    draw = np.random.default_rng(3)
    common = draw.random((5, 60)) + draw.normal(0, 0.3, (5, 1)) + draw.normal(0, 0.5, (1, 60))
    better = common + 0.05 + draw.normal(0, 0.02, (5, 60))
    paired = paired_difference(runs_of(better), runs_of(common))
    assert paired.excludes_zero
    assert paired.value == pytest.approx((better - common).mean(), abs=1e-12)
    first, second = interval(better), interval(common)
    unpaired = ((first.high - first.low) ** 2 + (second.high - second.low) ** 2) ** 0.5
    assert paired.high - paired.low < 0.1 * unpaired
    assert first.low < second.high  # the intervals of the two overlap all the same


def test_a_difference_is_over_what_both_have():
    mine = {0: {"a": 1.0, "b": 1.0}, 1: {"a": 1.0, "b": 1.0}, 5: {"a": 0.0, "b": 0.0}}
    other = {0: {"a": 0.0, "b": 1.0}, 1: {"a": 1.0, "b": 0.0}}
    found = paired_difference(mine, other)
    assert (found.value, found.seeds, found.problems) == (0.5, 2, 2)
    assert paired_difference(mine, {9: {"a": 1.0}}) is None
    assert paired_difference(mine, {0: {"z": 1.0}}) is None


def covered(draw, *, seeds, problems, seed_spread, problem_spread, noise, repeats=300, plain=False):
    """Share of simulated experiments whose interval holds the true mean."""
    hits = 0
    for _ in range(repeats):
        table = (
            0.4
            + draw.normal(0, seed_spread, (seeds, 1))
            + draw.normal(0, problem_spread, (1, problems))
            + draw.normal(0, noise, (seeds, problems))
        )
        found = interval(table)
        hits += found.low <= 0.4 <= found.high
    return hits / repeats


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize(
    "spreads", [(0.05, 0.3, 0.3), (0.1, 0.01, 0.1), (0.001, 0.4, 0.1)], ids=["both", "seeds", "problems"]
)
def test_intervals_cover_what_they_promise(seeds, spreads):
    """300 experiments: 95 % coverage would be below 91 % once in a thousand times."""
    seed_spread, problem_spread, noise = spreads
    draw = np.random.default_rng(seeds)
    share = covered(draw, seeds=seeds, problems=40, seed_spread=seed_spread, problem_spread=problem_spread, noise=noise)
    assert share >= 0.9


def test_without_the_widening_few_seeds_would_cover_too_little(monkeypatch):
    """The tempting interval, a plain bootstrap of three seeds, misses the truth far more often than it says."""
    monkeypatch.setattr(arena_statistics, "widening", lambda seeds: 1.0)
    draw = np.random.default_rng(7)
    assert covered(draw, seeds=3, problems=40, seed_spread=0.1, problem_spread=0.01, noise=0.1) < 0.85


def test_paired_differences_cover():
    draw, hits, repeats, seeds = np.random.default_rng(11), 0, 200, 3
    for _ in range(repeats):
        problems = draw.normal(0, 0.3, (1, 40))
        mine = 0.1 + problems + draw.normal(0, 0.05, (seeds, 1)) + draw.normal(0, 0.2, (seeds, 40))
        other = problems + draw.normal(0, 0.05, (seeds, 1)) + draw.normal(0, 0.2, (seeds, 40))
        found = paired_difference(runs_of(mine), runs_of(other))
        hits += found.low <= 0.1 <= found.high
    assert hits / repeats >= 0.9
