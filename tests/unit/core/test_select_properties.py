"""Selection by entropy: how many, which, and that nothing but the order of entropies decides."""

import math
from fractions import Fraction

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mifo.core.select import kept_count, top_entropy_tokens

HUNDREDTHS = st.integers(1, 100)
ENTROPIES = st.lists(st.integers(0, 6), min_size=1, max_size=30)


@given(st.integers(0, 5000), HUNDREDTHS)
def test_the_count_is_the_ceiling_in_exact_arithmetic(length, hundredths):
    assert kept_count(length, hundredths / 100) == math.ceil(Fraction(hundredths, 100) * length)


def selected(values, fraction):
    entropy = torch.tensor(values, dtype=torch.float64)
    return top_entropy_tokens(entropy, torch.zeros(len(values), dtype=torch.long), fraction).tolist()


@settings(max_examples=100, deadline=None)
@given(ENTROPIES, HUNDREDTHS)
def test_kept_are_the_highest_and_earlier_among_equals(values, hundredths):
    mask = selected(values, hundredths / 100)
    kept = [(v, -i) for i, v in enumerate(values) if mask[i]]
    left = [(v, -i) for i, v in enumerate(values) if not mask[i]]
    assert len(kept) == kept_count(len(values), hundredths / 100) >= 1
    assert not left or min(kept) > max(left)


@settings(max_examples=100, deadline=None)
@given(ENTROPIES, HUNDREDTHS, HUNDREDTHS)
def test_a_larger_share_keeps_what_a_smaller_one_keeps(values, one, other):
    small, large = (selected(values, share / 100) for share in sorted((one, other)))
    assert all(b for a, b in zip(small, large, strict=True) if a)


@settings(max_examples=100, deadline=None)
@given(ENTROPIES, HUNDREDTHS)
def test_only_the_order_of_entropies_counts(values, hundredths):
    assert selected(values, hundredths / 100) == selected([math.exp(v) + 3 for v in values], hundredths / 100)
