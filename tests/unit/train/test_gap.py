"""The limit of the gap: what it rests on, and when that is measured again."""

import pytest
import torch

from mifo.train.gap import MEASURE_EVERY, SamplerWatch


class Rounding:
    """A measurement that counts how often it is made."""

    def __init__(self, value):
        self.value, self.calls = value, 0

    def __call__(self):
        self.calls += 1
        return self.value


def test_in_fp32_there_is_nothing_to_measure():
    watch, rounding = SamplerWatch(None, torch.float32), Rounding(9.0)
    assert [watch.limit(gap, rounding) for gap in (0.0, 1e-6, 5.0)] == [1e-3] * 3
    assert rounding.calls == 0


def test_a_limit_that_was_given_holds():
    watch, rounding = SamplerWatch(0.25, torch.bfloat16), Rounding(9.0)
    assert watch.limit(7.0, rounding) == 0.25
    assert rounding.calls == 0


def test_the_limit_follows_what_rounding_does_to_this_model():
    watch, rounding = SamplerWatch(None, torch.bfloat16), Rounding(0.02)
    assert watch.limit(0.03, rounding) == pytest.approx(0.044)
    assert [watch.limit(0.04, rounding) for _ in range(MEASURE_EVERY - 1)] == pytest.approx(
        [0.044] * (MEASURE_EVERY - 1)
    )
    assert rounding.calls == 1
    rounding.value = 0.01
    assert watch.limit(0.04, rounding) == pytest.approx(0.022)  # an old figure would have been too generous
    assert rounding.calls == 2
    rounding.value = 0.05
    assert watch.limit(0.03, rounding) == pytest.approx(0.11)  # above the limit: measured again before it is an alarm
    assert rounding.calls == 3
    rounding.value = 1e-5
    assert SamplerWatch(None, torch.bfloat16).limit(0.0, rounding) == 1e-3


def test_what_was_measured_survives_a_checkpoint():
    watch, rounding = SamplerWatch(None, torch.bfloat16), Rounding(0.02)
    for _ in range(5):
        watch.limit(0.03, rounding)
    other = SamplerWatch(None, torch.bfloat16)
    other.load_state_dict(watch.state_dict())
    calls = []
    for each in (watch, other):
        fresh = Rounding(0.02)
        for _ in range(MEASURE_EVERY):
            each.limit(0.03, fresh)
        calls.append(fresh.calls)
    assert calls == [1, 1]
    assert watch.state_dict() == other.state_dict()
