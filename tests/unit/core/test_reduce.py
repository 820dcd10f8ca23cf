"""The one division: closed forms, and that the tempting means of means give other numbers."""

import pytest
import torch

from mifo.core.reduce import Totals, sequence_scale, update_totals, weighted_sum


def test_closed_form_of_two_unequal_micro_batches():
    # 10 tokens of loss 3.0 and 1000 tokens of loss 0.5
    [totals] = update_totals([[10, 1000]])
    micro_batches = [torch.full((10,), 3.0, dtype=torch.float64), torch.full((1000,), 0.5, dtype=torch.float64)]
    scales = [sequence_scale(10, totals, "token"), sequence_scale(1000, totals, "token")]
    loss = sum(weighted_sum(m, torch.full_like(m, s)) for m, s in zip(micro_batches, scales, strict=True))
    assert float(loss) == pytest.approx(530 / 1010, rel=1e-12)
    mean_of_means = sum(m.mean() for m in micro_batches) / 2
    assert float(mean_of_means) == 1.75  # what the published frameworks computed


def test_normalisers_by_hand():
    totals = Totals(tokens=12, sequences=3)
    assert sequence_scale(4, totals, "token") == 1 / 12
    assert sequence_scale(4, totals, "sequence") == 1 / 12
    assert sequence_scale(2, totals, "sequence") == 1 / 6
    assert sequence_scale(2, totals, "constant", 100) == 1 / 300


def test_empty_sequences_are_left_out_of_the_count():
    [totals] = update_totals([[0, 3, 0, 5]])
    assert totals == Totals(tokens=8, sequences=2)
    for name in ("token", "sequence", "constant"):
        assert sequence_scale(0, totals, name, 10) == 0.0


def test_totals_sum_over_ranks():
    other_rank = torch.tensor([[17, 1], [0, 0]])
    totals = update_totals([[3], []], lambda counts: counts + other_rank)
    assert totals == [Totals(tokens=20, sequences=2), Totals(tokens=0, sequences=0)]


def test_rows_outside_a_stream_add_nothing_even_if_not_finite():
    values = torch.tensor([1.0, float("nan"), float("inf")], requires_grad=True)
    total = weighted_sum(values, torch.tensor([2.0, 0.0, 0.0]))
    total.backward()
    assert float(total.detach()) == 2.0
    assert values.grad.tolist() == [2.0, 0.0, 0.0]
