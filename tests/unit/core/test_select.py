"""Exact top-ρ selection against a sort, with ties, and independent of batching."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mifo.core.select import kept_count, top_entropy_of_all, top_entropy_tokens
from mifo.errors import NumericsError


def oracle(entropies, owners, fraction):
    kept = [False] * len(entropies)
    for owner in set(owners):
        places = [i for i, o in enumerate(owners) if o == owner]
        best = sorted(places, key=lambda i: (-entropies[i], i))
        for i in best[: kept_count(len(places), fraction)]:
            kept[i] = True
    return kept


def test_by_hand():
    entropy = torch.tensor([0.1, 2.0, 0.3, 1.0, 0.0, 5.0])
    owner = torch.tensor([0, 0, 0, 0, 0, 1])
    assert top_entropy_tokens(entropy, owner, 0.2).tolist() == [False, True, False, False, False, True]
    assert top_entropy_tokens(entropy, owner, 0.4).tolist() == [False, True, False, True, False, True]


@pytest.mark.parametrize(
    ("length", "fraction", "count"), [(5, 0.2, 1), (6, 0.2, 2), (10, 0.3, 3), (1, 0.2, 1), (7, 1.0, 7), (0, 0.2, 0)]
)
def test_count_is_the_ceiling_of_the_real_number(length, fraction, count):
    assert kept_count(length, fraction) == count


def test_naive_ceiling_would_keep_one_too_many():
    assert math.ceil(0.1 * 3 * 10) == 4  # 0.1·3 is 0.30000000000000004
    assert kept_count(10, 0.1 * 3) == 3


def test_threshold_form_would_keep_every_tie():
    entropy, owner = torch.ones(10), torch.zeros(10, dtype=torch.long)
    assert top_entropy_tokens(entropy, owner, 0.2).tolist() == [True, True] + [False] * 8
    assert int((entropy >= entropy.topk(2).values.min()).sum()) == 10


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(0, 2**16)), min_size=1, max_size=6),
    st.sampled_from([0.1, 0.2, 0.5, 0.99, 1.0]),
)
def test_equals_a_sort_with_many_ties(rows, fraction):
    entropies, owners = [], []
    for owner, (length, seed) in enumerate(rows):
        draw = torch.Generator().manual_seed(seed)
        entropies += (torch.randint(0, 3, (length,), generator=draw) / 2).tolist()
        owners += [owner] * length
    mask = top_entropy_tokens(torch.tensor(entropies), torch.tensor(owners), fraction)
    assert mask.tolist() == oracle(entropies, owners, fraction)


def test_does_not_depend_on_how_sequences_are_batched():
    generator = torch.Generator().manual_seed(3)
    lengths = [4, 9, 1, 6]
    entropies = [torch.rand(n, generator=generator) for n in lengths]
    whole = top_entropy_tokens(
        torch.cat(entropies), torch.repeat_interleave(torch.arange(4), torch.tensor(lengths)), 0.3
    )
    alone = [top_entropy_tokens(e, torch.zeros(len(e), dtype=torch.long), 0.3) for e in entropies]
    assert torch.equal(whole, torch.cat(alone))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_entropies_without_an_order_are_refused(bad):
    with pytest.raises(NumericsError, match="1 of 3 entropies are not finite"):
        top_entropy_tokens(torch.tensor([1.0, bad, 2.0]), torch.zeros(3, dtype=torch.long), 0.5)


def test_of_all_is_one_ranking_over_everything():
    entropy = torch.tensor([0.1, 2.0, 0.3, 1.0, 0.0, 5.0, 4.0])
    assert top_entropy_of_all(entropy, 0.4).tolist() == [False, True, False, False, False, True, True]
    owner = torch.tensor([0, 0, 0, 0, 0, 1, 1])
    assert top_entropy_of_all(entropy, 0.4).tolist() != top_entropy_tokens(entropy, owner, 0.4).tolist()
    assert top_entropy_of_all(torch.empty(0), 0.4).tolist() == []


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.sampled_from([0.1, 0.2, 0.5, 1.0]))
def test_of_all_equals_a_sort_with_many_ties(values, fraction):
    entropies = [v / 2 for v in values]
    found = top_entropy_of_all(torch.tensor(entropies), fraction).tolist()
    assert found == oracle(entropies, [0] * len(entropies), fraction)


def test_of_all_takes_rounding_below_zero_for_zero():
    assert top_entropy_of_all(torch.tensor([-1e-9, 0.0, 1.0]), 0.5).tolist() == [True, False, True]
