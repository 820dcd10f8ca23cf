"""Frozen means bit-identical; zeroing a gradient is shown not to freeze."""

import pytest
import torch
from torch import nn

from mifo.core.freeze import FROZEN_FROM, ElementFreeze
from mifo.errors import ConfigError


def setup(optimizer_class, **settings):
    draw = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.randn(shape, generator=draw)) for shape in [(17, 3), (40,), (5,)]]
    masks = {p: torch.rand(p.shape, generator=draw) < 0.5 for p in parameters}
    optimizer = optimizer_class(parameters, **settings)
    for _ in range(3):  # gather momentum without a freeze
        gradients(parameters, draw)
        optimizer.step()
    return parameters, masks, optimizer, draw


def gradients(parameters, draw):
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=draw)


OPTIMIZERS = [
    (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.0, "fused": True}),  # frozen elements rest by themselves
    (torch.optim.AdamW, {"lr": 1e-6, "weight_decay": 0.01, "fused": True}),  # decay rounds to nothing
    (torch.optim.Adam, {"lr": 1e-2, "weight_decay": 0.0}),
    (torch.optim.Adam, {"lr": 1e-6, "weight_decay": 0.01}),  # decay that enters the gradient
    (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1}),
    (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.1, "fused": True}),
    (torch.optim.AdamW, {"lr": 1e-2, "amsgrad": True, "foreach": True}),
    (torch.optim.SGD, {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1}),
    (torch.optim.RMSprop, {"lr": 1e-2, "momentum": 0.5}),
    (torch.optim.Adagrad, {"lr": 1e-2}),
    (torch.optim.AdamW, {"lr": 1e-2, "weight_decay": 0.0, "eps": 0.0}),  # 0/0 where everything is zero
]


@pytest.mark.parametrize(("optimizer_class", "settings"), OPTIMIZERS)
def test_masked_elements_and_their_moments_keep_their_bits(optimizer_class, settings):
    parameters, masks, optimizer, draw = setup(optimizer_class, **settings)
    before = [p.detach().clone() for p in parameters]
    moments = [{k: v.clone() for k, v in optimizer.state[p].items() if torch.is_tensor(v)} for p in parameters]
    freeze = ElementFreeze(masks)
    for _ in range(3):
        gradients(parameters, draw)
        freeze.mask_gradients()
        freeze.step(optimizer)
        for parameter, old in zip(parameters, before, strict=True):  # after every step, not only at the end
            mask = masks[parameter]
            assert torch.equal(parameter.detach()[mask].view(torch.int32), old[mask].view(torch.int32))
    freeze.settle()
    for parameter, old, state in zip(parameters, before, moments, strict=True):
        mask = masks[parameter]
        assert torch.equal(parameter.detach()[mask].view(torch.int32), old[mask].view(torch.int32))
        if settings["lr"] > 1e-3:  # a smaller step rounds to nothing on some elements
            assert bool((parameter.detach()[~mask] != old[~mask]).all())
        for name, value in state.items():
            if value.shape == parameter.shape:
                assert torch.equal(optimizer.state[parameter][name][mask], value[mask]), name


@pytest.mark.parametrize(("optimizer_class", "settings"), OPTIMIZERS)
def test_unmasked_elements_move_as_without_a_freeze(optimizer_class, settings):
    runs = []
    for frozen in (True, False):
        parameters, masks, optimizer, draw = setup(optimizer_class, **settings)
        gradients(parameters, draw)
        freeze = ElementFreeze(masks)
        freeze.mask_gradients()
        freeze.step(optimizer) if frozen else optimizer.step()
        runs.append([p.detach()[~masks[p]] for p in parameters])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_zeroed_gradients_do_not_freeze():
    """Momentum and weight decay move what has no gradient."""
    parameters, masks, optimizer, draw = setup(torch.optim.AdamW, lr=1e-2, weight_decay=0.1)
    before = [p.detach().clone() for p in parameters]
    freeze = ElementFreeze(masks, mode="grad_zero")
    gradients(parameters, draw)
    freeze.mask_gradients()
    freeze.step(optimizer)
    for parameter, old in zip(parameters, before, strict=True):
        assert bool((parameter.detach()[masks[parameter]] != old[masks[parameter]]).all())


def test_first_step_of_a_fresh_optimizer():
    parameter = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, weight_decay=0.5)
    parameter.grad = torch.ones(4)
    mask = torch.tensor([True, False, True, False])
    freeze = ElementFreeze({parameter: mask})
    freeze.mask_gradients()
    freeze.step(optimizer)
    freeze.settle()
    assert parameter.detach()[mask].tolist() == [1.0, 1.0]
    assert optimizer.state[parameter]["exp_avg"][mask].tolist() == [0.0, 0.0]
    assert bool((parameter.detach()[~mask] < 1.0).all())


def test_gradient_that_is_not_finite_is_masked():
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.tensor([float("nan"), 1.0])
    ElementFreeze({parameter: torch.tensor([True, False])}).mask_gradients()
    assert parameter.grad.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("weight_decay", [0.1, 0.0])  # without decay frozen elements rest by themselves
def test_settling_half_way_changes_nothing(weight_decay):
    """A checkpoint in the middle of a phase settles; the phase then ends in the same bits."""
    runs = []
    for half_way in (False, True):
        parameters, masks, optimizer, draw = setup(torch.optim.AdamW, lr=1e-2, weight_decay=weight_decay)
        gradients(parameters, draw)
        optimizer.step()  # moments that are not zero when the phase begins
        with ElementFreeze(masks) as freeze:
            for _ in range(4):
                gradients(parameters, draw)
                freeze.mask_gradients()
                freeze.step(optimizer)
                if half_way:
                    freeze.settle()
        moments = [optimizer.state[p][name] for p in parameters for name in ("exp_avg", "exp_avg_sq")]
        runs.append([p.detach().clone() for p in parameters] + [m.clone() for m in moments])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)


def test_a_given_snapshot_is_used_and_left_alone():
    parameters, masks, optimizer, draw = setup(torch.optim.AdamW, lr=1e-2)
    snapshot = [p.detach().clone() for p in parameters]
    copies = [s.clone() for s in snapshot]
    marks = [3e-9 * mask for mask in masks.values()]
    gradients(parameters, draw)
    with ElementFreeze(marks.__getitem__, parameters, snapshot=snapshot) as freeze:
        freeze.step(optimizer)
    for parameter, kept, copy in zip(parameters, snapshot, copies, strict=True):
        assert torch.equal(kept, copy)
        assert torch.equal(parameter.detach()[masks[parameter]], copy[masks[parameter]])


def test_parameters_without_mask_or_gradient():
    masked, free, idle = (nn.Parameter(torch.ones(3)) for _ in range(3))
    optimizer = torch.optim.SGD([masked, free, idle], lr=1.0)
    masked.grad, free.grad = torch.ones(3), torch.ones(3)
    freeze = ElementFreeze({masked: torch.ones(3, dtype=torch.bool)})
    freeze.mask_gradients()
    freeze.step(optimizer)
    assert (masked.tolist(), free.tolist(), idle.tolist()) == ([1.0] * 3, [0.0] * 3, [1.0] * 3)


def test_lbfgs_is_refused():
    parameter = nn.Parameter(torch.ones(2))
    freeze = ElementFreeze({parameter: torch.zeros(2, dtype=torch.bool)})
    with pytest.raises(ConfigError, match="LBFGS"):
        freeze.step(torch.optim.LBFGS([parameter]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_width_and_every_value(dtype):
    """Signed zeros, NaN and infinities keep their bits; transposed gradients are masked too."""
    values = torch.tensor([[0.0, -0.0, float("nan")], [float("inf"), -1.5, 2.0]], dtype=dtype)
    parameter = nn.Parameter(values.clone())
    mask = torch.tensor([[True, True, True], [True, False, False]])
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    parameter.grad = torch.full((3, 2), float("nan"), dtype=dtype).t()
    with ElementFreeze({parameter: mask}) as freeze:
        freeze.mask_gradients()
        assert parameter.grad[mask].tolist() == [0.0] * 4
        parameter.grad = torch.ones(2, 3, dtype=dtype)
        freeze.step(optimizer)
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[values.element_size()]
    assert torch.equal(parameter.detach().view(width)[mask], values.view(width)[mask])
    assert parameter.detach()[~mask].tolist() == [-2.5, 1.0]


def test_forgetting_to_mask_gradients_still_freezes():
    parameters, masks, optimizer, draw = setup(torch.optim.AdamW, lr=1e-2, weight_decay=0.0)
    before = [p.detach().clone() for p in parameters]
    freeze = ElementFreeze(masks)
    for masked in (True, False, True):
        gradients(parameters, draw)
        if masked:
            freeze.mask_gradients()
        freeze.step(optimizer)
    for parameter, old in zip(parameters, before, strict=True):
        assert torch.equal(parameter.detach()[masks[parameter]], old[masks[parameter]])


def test_wrong_masks_and_modes_are_refused():
    parameter = nn.Parameter(torch.ones(2))
    with pytest.raises(ConfigError, match="mode='gradzero'"):
        ElementFreeze({parameter: torch.zeros(2, dtype=torch.bool)}, mode="gradzero")
    for mask in (torch.zeros(2, dtype=torch.int32), torch.zeros(3, dtype=torch.bool)):
        with pytest.raises(ConfigError, match="Give a bool tensor"):
            ElementFreeze({parameter: mask})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("weight_decay", [0.5, 0.0])
def test_every_dtype_and_memory_layout(dtype, transposed, weight_decay):
    """With values on which arithmetic would lose bits: −0.0, subnormals, NaN in a frozen gradient."""
    draw = torch.Generator().manual_seed(5)
    start, mask = torch.randn(6, 9, generator=draw).to(dtype), torch.rand(6, 9, generator=draw) < 0.5
    start[0], mask[0] = torch.tensor([-0.0, 1e-44, -1e-44, 0.0, 1e30, -0.0, 1e-38, 2.0, -3.0]).to(dtype), True
    parameter = nn.Parameter(start.t().contiguous().t() if transposed else start.clone())
    optimizer = torch.optim.AdamW([parameter], lr=1e-2, weight_decay=weight_decay)
    parameter.grad = torch.randn(6, 9, generator=draw).to(dtype)
    optimizer.step()
    optimizer.state[parameter]["exp_avg"][0, 0] = -0.0
    before = [t.detach().clone() for t in (parameter, *moments(optimizer, parameter))]
    with ElementFreeze({parameter: mask}) as freeze:
        for _ in range(3):
            parameter.grad = torch.randn(6, 9, generator=draw).to(dtype)
            parameter.grad[0] = float("nan")
            freeze.mask_gradients()
            freeze.step(optimizer)
    for now, kept in zip((parameter.detach(), *moments(optimizer, parameter)), before, strict=True):
        assert now[mask].tolist() == kept[mask].tolist()
        assert torch.equal(now[mask].signbit(), kept[mask].signbit())
        assert float((now[~mask] != kept[~mask]).float().mean()) > 0.5  # bf16 rounds some steps away


def moments(optimizer, parameter):
    return optimizer.state[parameter]["exp_avg"], optimizer.state[parameter]["exp_avg_sq"]


def test_marks_too_small_to_be_normal_numbers_freeze_nothing():
    """They read as zero on processors told to flush them, so they must mean the same everywhere."""
    parameter = nn.Parameter(torch.ones(4))
    marks = torch.tensor([0.0, 1e-40, FROZEN_FROM, 1.0])
    optimizer = torch.optim.SGD([parameter], lr=0.5)
    parameter.grad = torch.ones(4)
    with ElementFreeze(lambda _: marks, [parameter]) as freeze:
        freeze.step(optimizer)  # not masked, so the step moves all four and the freeze puts two back
    assert parameter.tolist() == [0.5, 0.5, 1.0, 1.0]
