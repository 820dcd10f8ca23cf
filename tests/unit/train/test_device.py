"""Where a run computes, and in what arithmetic."""

import pytest
import torch

from mifo.errors import DeviceError
from mifo.train.device import pick_device, pick_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": False, "avx512_bf16": True}, torch.float32),  # its dot products are slower than float32
        ({"bf16": True}, torch.bfloat16),  # Arm
        ({"bf16": False}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_bfloat16_on_a_cpu_that_multiplies_it_faster(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert pick_dtype("auto", CPU) == expected


def test_arithmetic_that_is_asked_for_is_given():
    assert pick_dtype("float32", CPU) == torch.float32
    assert pick_dtype("bfloat16", CPU) == torch.bfloat16


@pytest.mark.parametrize("name", ["tpu", "mps", "cuda:7000"])
def test_a_device_that_cannot_be_used(name):
    with pytest.raises(DeviceError, match=f"model.device = '{name}'"):
        pick_device(name)
