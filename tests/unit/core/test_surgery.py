"""Fusion, reset, pruning, neuron selection and gradient drop against hand-made cases and slow oracles."""

import math

import pytest
import torch
from torch import nn

from mifo.core.surgery import GradientDrop, fuse, keep_mask, prune, reset_neurons, top_neurons
from mifo.errors import NumericsError


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8).tolist()


def test_fusion_by_hand():
    over, base = torch.tensor([4.0, 1.0, -2.0]), torch.tensor([0.0, 1.0, 2.0])
    assert fuse(over, base, 0.25).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fusion_ends_in_the_inputs_bits(dtype):
    generator = torch.Generator().manual_seed(0)
    over, base = (torch.randn(50, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    over[0], base[1] = -0.0, float("nan")
    assert bits(fuse(over, base, 1.0)) == bits(over)
    assert bits(fuse(over, base, 0.0)) == bits(base)
    assert fuse(over, base, 0.3).dtype == dtype


def test_elements_that_sft_never_moved_keep_their_value_for_every_alpha():
    base = torch.randn(10_000, generator=torch.Generator().manual_seed(1))
    naive = 0.3 * base + (1 - 0.3) * base
    assert not torch.equal(naive, base)  # rounding of the printed formula moves some
    for alpha in (0.1, 0.3, 0.5, 0.9):
        assert torch.equal(fuse(base.clone(), base, alpha), base)


def test_fusion_is_rounded_once():
    over, base = torch.tensor([1.0078125], dtype=torch.bfloat16), torch.tensor([1.0], dtype=torch.bfloat16)
    exact = 0.75 * 1.0078125 + 0.25 * 1.0
    assert float(fuse(over, base, 0.75)) == float(torch.tensor(exact).bfloat16())
    mixed = fuse(over.float(), base, 0.75)
    assert mixed.dtype == torch.float32  # the wider type holds both exactly
    assert float(mixed) == exact


def test_integers_are_not_fused():
    over = torch.tensor([7, 8])
    assert fuse(over, torch.tensor([1, 2]), 0.5) is over


def test_reset_of_rows_columns_and_biases():
    fused, base = torch.arange(6.0).view(2, 3), -torch.ones(2, 3)
    rows = reset_neurons(fused, base, torch.tensor([False, True]), 0)
    assert rows.tolist() == [[0, 1, 2], [-1, -1, -1]]
    columns = reset_neurons(fused, base, torch.tensor([True, False, True]), 1)
    assert columns.tolist() == [[-1, 1, -1], [-1, 4, -1]]
    assert reset_neurons(fused[0], base[0], torch.tensor([False, True, False]), 0).tolist() == [0, -1, 2]
    assert fused.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_pruning_keeps_the_bits_of_both_ends():
    generator = torch.Generator().manual_seed(2)
    start, end = torch.randn(1000, generator=generator), torch.randn(1000, generator=generator)
    keep = torch.rand(1000, generator=generator) < 0.5
    pruned = prune(start, end, keep)
    assert torch.equal(pruned[keep], end[keep])
    assert torch.equal(pruned[~keep], start[~keep])
    through_the_difference = start + keep * (end - start)
    assert not torch.equal(through_the_difference, pruned)  # the difference rounds
    assert torch.allclose(through_the_difference, pruned, atol=1e-6)


def slow_top(scores, sizes, fraction, per_module):
    """Python's own sort over (score, place)."""
    chosen, start = set(), 0
    groups = sizes if per_module else [sum(sizes)]
    for size in groups:
        places = range(start, start + size)
        ranked = sorted(places, key=lambda i: (-scores[i], i))[: math.ceil(round(fraction * size, 9))]
        chosen |= {i for i in ranked if scores[i] > 0}
        start += size
    return [i in chosen for i in range(sum(sizes))]


@pytest.mark.parametrize("per_module", [False, True])
@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.2, 0.5, 1.0])
def test_top_neurons_against_a_sort(fraction, per_module):
    scores = torch.randn(100, generator=torch.Generator().manual_seed(3))
    scores[40:60] = 0.75  # ties
    sizes = [10, 30, 60]
    found = top_neurons(scores, sizes, fraction, per_module=per_module)
    assert found.tolist() == slow_top(scores.tolist(), sizes, fraction, per_module)


def test_negative_contributions_are_never_chosen():
    scores = torch.tensor([-5.0, 0.1, 0.0, -0.0, 3.0])
    assert top_neurons(scores, [5], 1.0).tolist() == [False, True, False, False, True]
    by_size = scores.abs().topk(1).indices.item()
    assert by_size == 0  # ranking by absolute value would take the most negative first
    assert top_neurons(scores, [5], 0.2).tolist() == [False, False, False, False, True]


def test_a_quota_for_each_module_spreads_what_a_global_rank_gathers():
    scores = torch.tensor([9.0, 8.0, 7.0, 6.0, 0.4, 0.3, 0.2, 0.1])
    assert top_neurons(scores, [4, 4], 0.5).tolist() == [True] * 4 + [False] * 4
    assert top_neurons(scores, [4, 4], 0.5, per_module=True).tolist() == [True, True, False, False] * 2


def test_scores_that_are_not_finite_are_refused():
    with pytest.raises(NumericsError, match="1 of 2 attribution scores"):
        top_neurons(torch.tensor([1.0, float("nan")]), [2], 0.5)


def test_masks_are_functions_of_seed_step_and_name():
    mask = keep_mask((40, 50), 0.3, seed=1, step=2, name="a")
    torch.manual_seed(99)
    torch.rand(7)
    assert torch.equal(mask, keep_mask((40, 50), 0.3, seed=1, step=2, name="a"))
    others = [
        {"seed": 2, "step": 2, "name": "a"},
        {"seed": 1, "step": 3, "name": "a"},
        {"seed": 1, "step": 2, "name": "b"},
    ]
    for other in others:
        share = (mask == keep_mask((40, 50), 0.3, **other)).float().mean()
        assert abs(float(share) - (0.7**2 + 0.3**2)) < 0.06  # independent: 5 standard deviations


def test_the_share_kept_is_the_one_asked_for():
    kept = float(keep_mask((200_000,), 0.9, seed=0, step=0, name="w").float().mean())
    assert abs(kept - 0.1) < 5 * math.sqrt(0.09 / 200_000)
    assert keep_mask((9,), 0.0, seed=0, step=0, name="w").all()
    assert not keep_mask((9,), 1.0, seed=0, step=0, name="w").any()


def test_dropped_gradients_are_zero_and_the_others_are_not_scaled():
    parameters = {name: nn.Parameter(torch.zeros(30, 20)) for name in "ab"} | {"c": nn.Parameter(torch.zeros(3))}
    before = {}
    for name in "ab":
        before[name] = torch.randn(30, 20, generator=torch.Generator().manual_seed(ord(name)))
        parameters[name].grad = before[name].clone()
    GradientDrop(0.5, seed=4).apply(parameters, step=6)
    assert parameters["c"].grad is None
    for name in "ab":
        keep = keep_mask((30, 20), 0.5, seed=4, step=6, name=name)
        assert 0.3 < float(keep.float().mean()) < 0.7
        assert torch.equal(parameters[name].grad, before[name] * keep)
