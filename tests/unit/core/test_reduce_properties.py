"""The one division: sums do not depend on how sequences are cut into micro-batches, ordered, or spread over ranks."""

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mifo.core.reduce import Totals, sequence_scale, update_totals, weighted_sum

LOSSES = st.lists(st.lists(st.integers(-50, 50), max_size=9), min_size=1, max_size=9).filter(lambda rows: any(rows))
NORMALIZERS = st.sampled_from(["token", "sequence", "constant"])


def reduced(batches, totals, normalizer):
    """The update's loss from the losses [sequence][token] of its micro-batches, in float64."""
    total = 0.0
    for batch in batches:
        values = torch.tensor([v for row in batch for v in row], dtype=torch.float64)
        scales = [sequence_scale(len(row), totals, normalizer, 7) for row in batch for _ in row]
        total += float(weighted_sum(values, torch.tensor(scales, dtype=torch.float64)))
    return total


@given(LOSSES, NORMALIZERS, st.randoms(use_true_random=False))
def test_neither_order_nor_micro_batches_matter(losses, normalizer, draw):
    [totals] = update_totals([[len(row) for row in losses]])
    rows, batches = draw.sample(losses, len(losses)), []
    while rows:
        cut = draw.randint(1, len(rows))
        batches.append(rows[:cut])
        rows = rows[cut:]
    assert reduced(batches, totals, normalizer) == pytest.approx(
        reduced([losses], totals, normalizer), rel=1e-12, abs=1e-12
    )


@given(LOSSES, NORMALIZERS)
def test_equals_the_formula(losses, normalizer):
    filled = [row for row in losses if row]
    expected = {
        "token": sum(map(sum, filled)) / sum(map(len, filled)),
        "sequence": sum(sum(row) / len(row) for row in filled) / len(filled),
        "constant": sum(map(sum, filled)) / (7 * len(filled)),
    }[normalizer]
    [totals] = update_totals([[len(row) for row in losses]])
    assert reduced([losses], totals, normalizer) == pytest.approx(expected, rel=1e-12, abs=1e-12)


@given(LOSSES, NORMALIZERS, st.integers(1, 4), st.integers(0, 2**32))
def test_ranks_see_the_totals_of_all(losses, normalizer, ranks, seed):
    draw = random.Random(seed)
    parts = [[] for _ in range(ranks)]
    for row in losses:
        draw.choice(parts).append(row)
    counts = [torch.tensor([[sum(map(len, part)), sum(bool(row) for row in part)]]) for part in parts]
    found = {update_totals([[len(row) for row in part]], lambda _: sum(counts))[0] for part in parts}
    [totals] = found
    assert totals == Totals(tokens=sum(map(len, losses)), sequences=sum(map(bool, losses)))
    [whole] = update_totals([[len(row) for row in losses]])
    spread = sum(reduced([part], totals, normalizer) for part in parts if part)
    assert spread == pytest.approx(reduced([losses], whole, normalizer), rel=1e-12, abs=1e-12)
