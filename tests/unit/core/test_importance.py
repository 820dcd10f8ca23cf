"""The importance map and exact top-k against a stable sort; shards as threads of one process and as gloo processes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mifo.core.topk as topk
from mifo.core.importance import ImportanceMap
from mifo.core.topk import Shards, select_top_k
from mifo.errors import ConfigError, NumericsError


def oracle(values, k):
    """Positions of the k largest in (tensor order, flat index), earlier first among equals."""
    flat = torch.cat([v.reshape(-1) for v in values])
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[torch.argsort(flat, descending=True, stable=True)[:k]] = True
    return list(mask.split([v.numel() for v in values]))


def tied_values(seed, shapes, levels=5):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(0, levels, shape, generator=draw).float() / 4 for shape in shapes]


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 40), min_size=1, max_size=5), st.floats(0, 1))
def test_equals_a_stable_sort_with_ties_and_zeros(seed, sizes, share):
    values = tied_values(seed, [(n,) for n in sizes])
    k = int(share * sum(sizes))
    masks = select_top_k(values, k)
    assert sum(int(m.sum()) for m in masks) == k
    for mine, theirs in zip(masks, oracle(values, k), strict=True):
        assert torch.equal(mine, theirs)


def test_wide_range_of_magnitudes_and_subnormals():
    values = [torch.tensor([1e-45, 1e-40, 0.0, 3e38, 1e-5, 1.0000001e-5, 1e-5])]
    for k in range(8):
        assert torch.equal(select_top_k(values, k)[0], oracle(values, k)[0]), k


def test_blocks_do_not_matter(monkeypatch):
    values = tied_values(1, [(1000,), (37, 11)], levels=50)
    whole = select_top_k(values, 500)
    monkeypatch.setattr("mifo.core.blocks.CACHE_BLOCK", 64)
    for a, b in zip(whole, select_top_k(values, 500), strict=True):
        assert torch.equal(a, b)


def drawn(kind, count, draw):
    """Values on which a sample of every seventh element is right, blunt (one bin holds most), or wrong."""
    values = torch.exp(4 * torch.randn(count, generator=draw))
    if kind == "ties":
        values = (values * 2).round() / 2
    if kind == "misleading":
        values[::7] *= 1e-30
    return values


@pytest.mark.parametrize("kind", ["spread", "ties", "misleading"])
@pytest.mark.parametrize("size", [1, 3])
def test_a_sample_only_saves_time(kind, size, monkeypatch):
    monkeypatch.setattr("mifo.core.topk.SAMPLED_FROM", 100)
    monkeypatch.setattr("mifo.core.topk.SAMPLE_STRIDE", 7)
    found = []
    narrow = topk._near_threshold

    def watched(*arguments):
        result = narrow(*arguments)
        found.append(result is not None)
        return result

    monkeypatch.setattr("mifo.core.topk._near_threshold", watched)
    draw = torch.Generator().manual_seed(2)
    values = [drawn(kind, count, draw) for count in (70_000, 700, 4, 7_000)]
    total = sum(v.numel() for v in values)
    pieces = [[v.tensor_split(size)[rank].contiguous() for v in values] for rank in range(size)]
    for k in (1, total // 100, total // 2, total - 1, total):
        results = shards_in_lockstep(pieces, lambda mine, shards, k=k: select_top_k(mine, k, shards))
        for index, expected in enumerate(oracle(values, k)):
            assert torch.equal(torch.cat([result[index] for result in results]), expected), k
    assert any(found)
    assert all(found) is (kind != "misleading")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_values_without_an_order_are_refused(bad):
    with pytest.raises(NumericsError, match="tensor 1"):
        select_top_k([torch.ones(3), torch.tensor([1.0, bad])], 2)


def shards_in_lockstep(pieces, work):
    """Run `work(rank values, Shards)` for every rank in threads whose all_sum really adds up over ranks."""
    import threading

    size = len(pieces)
    barrier = threading.Barrier(size)
    board = [None] * size
    results = [None] * size

    def run(rank):
        def all_sum(tensor):
            board[rank] = tensor.clone()
            barrier.wait()
            total = sum(board)
            barrier.wait()
            return total

        results[rank] = work(pieces[rank], Shards(rank, size, all_sum))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.mark.parametrize("size", [2, 3, 5])
def test_independent_of_how_elements_are_split(size):
    values = tied_values(7, [(41,), (8, 9), (3,), (100,)])
    k = 97
    pieces = [[v.reshape(-1).tensor_split(size)[rank].contiguous() for v in values] for rank in range(size)]
    results = shards_in_lockstep(pieces, lambda mine, shards: select_top_k(mine, k, shards))
    for index, expected in enumerate(oracle(values, k)):
        assert torch.equal(torch.cat([result[index] for result in results]), expected)


def move(parameters, deltas):
    with torch.no_grad():
        for parameter, delta in zip(parameters, deltas, strict=True):
            parameter += delta


def test_history_by_hand():
    parameter = nn.Parameter(torch.zeros(4))
    importance = ImportanceMap([parameter], top=0.5, history=0.5)
    move([parameter], [torch.tensor([4.0, -2.0, 1.0, 0.0])])
    report = importance.end_interval()
    assert importance.importance[0].tolist() == [2.0, 1.0, 0.0, 0.0]  # C̃ = ½Δ, top 2 kept
    assert importance.mask(0).tolist() == [True, True, False, False]
    assert (report.frozen, report.moved, report.fraction, report.threshold) == (2, 3, 0.5, 1.0)
    importance.begin_interval()
    move([parameter], [torch.tensor([0.0, 0.0, 3.0, 0.5])])
    importance.end_interval()
    assert importance.importance[0].tolist() == [1.0, 0.0, 1.5, 0.0]  # C̃ = [1, .5, 1.5, .25]


def test_dagger_forgets_earlier_intervals():
    parameter = nn.Parameter(torch.zeros(4))
    importance = ImportanceMap([parameter], top=0.5, history=0.0)
    move([parameter], [torch.tensor([9.0, 9.0, 0.0, 0.0])])
    importance.end_interval()
    importance.begin_interval()
    move([parameter], [torch.tensor([0.0, 0.0, 1.0, 1.0])])
    importance.end_interval()
    assert importance.mask(0).tolist() == [False, False, True, True]


def test_elements_that_never_moved_are_never_frozen_unless_asked():
    parameter = nn.Parameter(torch.zeros(6))
    delta = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 0.0])
    importance = ImportanceMap([parameter], top=0.5)
    move([parameter], [delta])
    report = importance.end_interval()
    assert importance.mask(0).tolist() == [False, False, True, False, False, False]
    assert report.frozen == 1
    filled = ImportanceMap([parameter], top=0.5, fill_ties=True)
    move([parameter], [delta])
    assert filled.end_interval().frozen == 3
    assert filled.mask(0).tolist() == [True, True, True, False, False, False]
    for map_ in (importance, filled):
        assert torch.equal(map_.marks(0) > 0, map_.mask(0))


def test_scope_tensor_takes_the_share_of_each():
    parameters = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))]
    deltas = [torch.tensor([5.0, 6.0, 7.0, 8.0]), torch.tensor([0.1, 0.2, 0.3, 0.4])]
    whole, each = ImportanceMap(parameters, top=0.5), ImportanceMap(parameters, top=0.5, scope="tensor")
    move(parameters, deltas)
    whole.end_interval()
    each.end_interval()
    assert [m.tolist() for m in whole.masks().values()] == [[True] * 4, [False] * 4]
    assert [m.tolist() for m in each.masks().values()] == [[False, False, True, True]] * 2


def test_tied_parameters_count_once():
    shared = nn.Parameter(torch.zeros(2, 2))
    importance = ImportanceMap([shared, shared, nn.Parameter(torch.zeros(4))], top=0.5)
    move([shared], [torch.ones(2, 2)])
    assert importance.end_interval().elements == 8


def test_state_survives_a_round_trip():
    parameter = nn.Parameter(torch.zeros(8))
    first = ImportanceMap([parameter], top=0.25, fill_ties=True)
    move([parameter], [torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0])])
    first.end_interval()
    second = ImportanceMap([parameter], top=0.25, fill_ties=True)
    second.load_state_dict({k: [t.clone() for t in v] for k, v in first.state_dict().items()})
    assert torch.equal(first.mask(0), second.mask(0))
    assert int(first.mask(0).sum()) == 2


def test_the_share_is_that_of_the_real_number():
    """0.57 · 100 is 56.99999999999999 as a float; 57 elements are meant."""
    parameter = nn.Parameter(torch.zeros(100))
    importance = ImportanceMap([parameter], top=0.57)
    move([parameter], [torch.arange(1.0, 101.0)])
    assert importance.end_interval().frozen == 57
    assert int(importance.mask(0).sum()) == 57


def test_parameters_of_any_stride_and_width():
    """Channels-last and transposed parameters, and fp64 moves far below fp32's resolution of the weight."""
    parameters = [nn.Parameter(torch.ones(4, 3).t()), nn.Parameter(torch.ones(4, dtype=torch.float64))]
    importance = ImportanceMap(parameters, top=0.25)
    delta = torch.zeros(3, 4)
    delta[1, 2] = 0.5
    move(parameters, [delta, torch.tensor([0.0, 1e-12, 0.0, 0.0], dtype=torch.float64)])
    assert importance.end_interval().moved == 2
    assert importance.mask(0).nonzero().tolist() == [[1, 2]]
    assert importance.mask(1).tolist() == [False, True, False, False]


@pytest.mark.parametrize("wrong", [{"top": -0.2}, {"top": 1.5}, {"history": 1.0}, {"scope": "tensors"}])
def test_wrong_settings_are_refused(wrong):
    with pytest.raises(ConfigError, match="ImportanceMap"):
        ImportanceMap([nn.Parameter(torch.zeros(2))], **wrong)
