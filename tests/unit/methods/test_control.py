"""The control of freezing: its law by hand, and on simulated plants."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mifo.config.decode import decode
from mifo.config.schema import Config, FreezeControlConfig
from mifo.methods import make_method
from mifo.methods.control import FreezeControl
from mifo.types import Freeze


def control(freeze_top=0.5, token_fraction=0.2, **settings):
    return FreezeControl(FreezeControlConfig(**settings), freeze_top=freeze_top, token_fraction=token_fraction)


def test_the_law_by_hand():
    own = control(target_drop=0.02, gain=2.0, smoothing=0.25, token_gain=0.5, token_max=0.3)
    own.measured(0.50, 0.40)  # m = 0.10
    assert own.freeze_top == pytest.approx(0.5 + 2.0 * 0.08)
    assert own.token_fraction == pytest.approx(0.2 - 0.5 * 0.08)
    own.measured(0.40, 0.44)  # m = 0.25 · 0.10 + 0.75 · (−0.04) = −0.005
    assert own.mean_drop == pytest.approx(-0.005)
    assert own.freeze_top == pytest.approx(0.66 - 2.0 * 0.025)
    assert own.token_fraction == pytest.approx(0.16 + 0.5 * 0.025)


def test_without_a_target_nothing_moves():
    own = control()
    own.measured(1.0, 0.0)
    assert (own.freeze_top, own.token_fraction, own.progress()) == (0.5, 0.2, {})


def test_rho_stays_without_a_gain_of_its_own():
    own = control(target_drop=0.0, token_fraction=0.02)  # below token_min, which does not hold then
    own.measured(1.0, 0.0)
    assert own.token_fraction == 0.02


def plant(top, noise):
    """Drop of an SFT phase: less the more is frozen, never quite linear, measured with noise."""
    return 0.2 * (1.0 - top) ** 1.5 + noise


@pytest.mark.parametrize("start", [0.0, 0.5, 0.95])
@pytest.mark.parametrize(("target", "seed"), [(0.02, 0), (0.05, 1), (0.1, 2)])
def test_it_settles_into_a_band_around_the_target(start, target, seed):
    """Noise of a meter of some hundred problems: the mean of the true drops settles within a point of the target."""
    generator = random.Random(seed)
    own = control(freeze_top=start, target_drop=target, gain=1.0, smoothing=0.5)
    drops = []
    for _ in range(200):
        drops.append(plant(own.freeze_top, 0.0))
        own.measured(0.5, 0.5 - plant(own.freeze_top, generator.gauss(0.0, 0.02)))
    assert sum(drops[100:]) / 100 == pytest.approx(target, abs=0.01)
    assert max(abs(drop - target) for drop in drops[100:]) < 0.05


def test_without_noise_it_converges():
    own = control(freeze_top=0.0, target_drop=0.05, gain=1.0)
    for _ in range(300):
        own.measured(0.5, 0.5 - plant(own.freeze_top, 0.0))
    assert plant(own.freeze_top, 0.0) == pytest.approx(0.05, abs=1e-4)
    assert own.freeze_top == pytest.approx(1.0 - 0.25 ** (2 / 3), abs=1e-3)


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_the_limit_of_stability_is_where_the_documentation_says(smoothing):
    """On a linear plant of slope −s: g·s < 2 (1 + β)/(1 − β) settles, more does not."""
    limit = 2.0 * (1.0 + smoothing) / (1.0 - smoothing)
    for share, settles in ((0.9, True), (1.1, False)):
        own = control(freeze_top=0.4, target_drop=0.1, gain=share * limit / 0.2, smoothing=smoothing, freeze_max=1.0)
        tops = []
        for _ in range(400):
            own.measured(1.0, 1.0 - 0.2 * (1.0 - own.freeze_top))
            tops.append(own.freeze_top)
        assert (max(tops[-20:]) - min(tops[-20:]) < 1e-3) == settles


def test_nothing_winds_up_at_a_limit():
    """However long k stands at its limit, it leaves with the first mean drop on the other side."""
    for length in (1, 200):
        own = control(target_drop=0.02, gain=1.0, smoothing=0.0, freeze_max=0.9)
        for _ in range(length):
            own.measured(0.9, 0.1)
        assert own.freeze_top == 0.9
        own.measured(0.5, 0.52)
        assert own.freeze_top == pytest.approx(0.86)


@given(st.floats(-1, 1), st.floats(-1, 1), st.floats(0, 0.9))
def test_more_forgotten_never_frees_more(first, second, smoothing):
    low, high = sorted((first, second))
    tops, fractions = [], []
    for drop in (low, high):
        own = control(target_drop=0.0, smoothing=smoothing, token_gain=0.3)
        own.measured(0.5, 0.5 - drop)
        tops.append(own.freeze_top), fractions.append(own.token_fraction)
        assert 0.0 <= own.freeze_top <= 0.95
        assert 0.05 <= own.token_fraction <= 1.0
    assert tops[0] <= tops[1]
    assert fractions[0] >= fractions[1]


def test_state_goes_and_comes_back():
    own, other = (control(target_drop=0.0, token_gain=0.1) for _ in range(2))
    own.measured(0.5, 0.3)
    other.load_state_dict(own.state_dict())
    for one in (own, other):
        one.measured(0.4, 0.35)
    assert own.state_dict() == other.state_dict()


def test_mifo_freezes_what_control_says():
    tables = {"buffer_size": 1, "freeze_top": 0.0, "control": {"target_drop": 0.1, "gain": 0.5, "smoothing": 0.0}}
    method = make_method(decode(Config, {"method": {"name": "mifo", **tables}}))
    method.learning = True
    assert method.next_phase().freeze == Freeze(top=0.0, history=0.5)  # and there is an importance map to learn from
    method.sft_measured(0.6, 0.2)
    assert method.next_phase().freeze.top == pytest.approx(0.15)
    assert method.progress()["freeze_top"] == pytest.approx(0.15)
    other = make_method(decode(Config, {"method": {"name": "mifo", **tables}}))
    other.load_state_dict(method.state_dict())
    assert other.next_phase() == method.next_phase()
