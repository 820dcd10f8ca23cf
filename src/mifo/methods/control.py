"""A control of MIFO's freezing by what its SFT phases cost; no paper's, and off unless `target_drop` is set.

    d_i = accuracy before − accuracy after SFT phase i          what the forgetting meter says
    m_i = β m_{i−1} + (1 − β) d_i,  m_1 = d_1                   single measurements are noisy
    k_{i+1} = clip(k_i + g (m_i − d*), k_min, k_max)            more forgotten than d*: freeze more
    ρ_{i+1} = clip(ρ_i − g_ρ (m_i − d*), ρ_min, ρ_max)          and, if asked for, learn fewer tokens

An integral law: at rest the mean drop is d*, whatever the drop is as a function of k. The integral is k itself, so nothing
winds up while k stands at a limit: it leaves with the first mean drop on the other side. See docs/freezing.md for gains.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mifo.config.schema import FreezeControlConfig


class FreezeControl:
    """The k and ρ of the next SFT phase.

    Args:
        control: the law's settings; without a target neither moves.
        freeze_top: k of the first phase.
        token_fraction: ρ of the first phase.
    """

    def __init__(self, control: FreezeControlConfig, *, freeze_top: float, token_fraction: float) -> None:
        self.control = control
        self.freeze_top, self.token_fraction = freeze_top, token_fraction
        self.mean_drop: float | None = None

    def measured(self, before: float, after: float) -> None:
        """Accuracy around the phase that used the present k and ρ, as shares."""
        control = self.control
        if control.target_drop is None:
            return
        drop = before - after
        if self.mean_drop is not None:
            drop = control.smoothing * self.mean_drop + (1.0 - control.smoothing) * drop
        self.mean_drop = drop
        error = drop - control.target_drop
        self.freeze_top = _clipped(self.freeze_top + control.gain * error, control.freeze_min, control.freeze_max)
        if control.token_gain > 0.0:
            fraction = self.token_fraction - control.token_gain * error
            self.token_fraction = _clipped(fraction, control.token_min, control.token_max)

    def progress(self) -> dict[str, float]:
        """k and ρ of the next phase; {} without a target."""
        if self.control.target_drop is None:
            return {}
        return {"freeze_top": self.freeze_top, "token_fraction": self.token_fraction}

    def state_dict(self) -> dict[str, Any]:
        """Both, and the mean drop."""
        return {"freeze_top": self.freeze_top, "token_fraction": self.token_fraction, "mean_drop": self.mean_drop}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.freeze_top, self.token_fraction = float(state["freeze_top"]), float(state["token_fraction"])
        self.mean_drop = None if state["mean_drop"] is None else float(state["mean_drop"])


def _clipped(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)
