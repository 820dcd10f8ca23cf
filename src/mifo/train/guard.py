"""Which updates are taken: spikes are flagged before the step, skipped updates are counted, the last good weights are kept.

An update is judged between its backward pass and the optimizer's step, from figures that exist by then:

    gradient norm   spike where  norm > factor · median of the window
    loss            spike where  loss − median > factor · spread,
                    spread = max(1.4826 · median |x − median|, 0.1 · |median|, 1e-3)

Medians are over the last `guard.spike_window` updates of the same phase (RL and SFT have losses and norms of their own), spikes
included: a lasting change of level stops being a spike after half a window. Fewer than eight updates say nothing. 1.4826
makes the median deviation the standard deviation of a normal distribution.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mifo.config.schema import GuardConfig
from mifo.errors import NumericsError
from mifo.train.faults import Fault
from mifo.train.optim import ScheduledAdamW
from mifo.train.rollback import LastGood

LEAST_HISTORY = 8
NORMAL_SPREAD = 1.4826
LEAST_SPREAD, LEAST_SHARE = 1e-3, 0.1  # of the loss: in nats, and as a share of its median


class Guard:
    """Running statistics of one run, its skipped updates, and the copy that a rollback goes back to.

    Args:
        settings: the [guard] table.
        skip_above_norm: legacy: skip every update with a larger gradient norm, whatever is usual.
    """

    def __init__(self, settings: GuardConfig, skip_above_norm: float | None = None) -> None:
        self.settings = settings
        self.skip_above_norm = skip_above_norm
        self.phase: str | None = None
        self.norms: dict[str, list[float]] = {}
        self.losses: dict[str, list[float]] = {}
        self.in_a_row: dict[str, int] = {}
        self.good = LastGood()

    def forget(self) -> None:
        """Another stage begins: what was usual says nothing, and there is no going back into the one before."""
        self.phase = None
        self.norms, self.losses, self.in_a_row = {}, {}, {}
        self.good.forget()

    def begin(self, phase: str) -> None:
        """The coming updates are of this phase. A rollback never crosses a change of phase."""
        if phase != self.phase:
            self.good.forget()
        self.phase = phase

    def judge(self, loss: float, norm: float) -> Fault | None:
        """Whether the coming step would be a spike, and what to do about it; both figures join the window.

        An update from which nothing can be learned has norm 0 and says nothing about the others.
        """
        assert self.phase is not None
        if norm == 0.0:
            return None
        reasons = []
        norms, losses = self.norms.setdefault(self.phase, []), self.losses.setdefault(self.phase, [])
        if len(norms) >= LEAST_HISTORY:
            typical = statistics.median(norms)
            if norm > self.settings.spike_factor * typical:
                reasons.append(f"gradient norm {norm:.3g}, {norm / typical:.1f} times the usual {typical:.3g}")
            typical = statistics.median(losses)
            if loss - typical > self.settings.spike_factor * loss_spread(losses):
                reasons.append(f"loss {loss:.3g}, far above the usual {typical:.3g}")
        for window, value in ((norms, norm), (losses, loss)):
            window.append(value)
            del window[: -self.settings.spike_window]
        if self.skip_above_norm is not None and norm > self.skip_above_norm:
            limit = f"gradient norm {norm:.3g}, above legacy.skip_above_norm = {self.skip_above_norm:g}"
            return Fault(kind="norm", reason=limit)
        if not reasons:
            return None
        action = self.settings.on_spike
        if action == "rollback" and not self.good.held:
            action = "skip"
        return Fault(kind="spike", reason="; ".join(reasons), action=action)

    def keep(self, parameters: Sequence[nn.Parameter], optimizer: ScheduledAdamW) -> None:
        """Called before a step with weights at which loss and gradient were as usual."""
        if self.settings.on_spike == "rollback":
            self.good.keep(parameters, optimizer)

    def count(self, fault: Fault | None) -> None:
        """Count an update that was skipped (or taken).

        Raises:
            NumericsError: so many in a row were skipped; says what to do.
        """
        assert self.phase is not None
        skipped = fault is not None and fault.action != "warn"
        self.in_a_row[self.phase] = self.in_a_row.get(self.phase, 0) + 1 if skipped else 0
        if fault is None or self.in_a_row[self.phase] < self.settings.skips_in_a_row:
            return
        named = "; ".join(str(sample) for sample in fault.samples[:3]) or "no sample stands out"
        raise NumericsError(
            f"{self.in_a_row[self.phase]} updates of phase '{self.phase}' in a row were skipped (guard.skips_in_a_row = "
            f"{self.settings.skips_in_a_row}). The last one: {fault.reason} ({named}). No weight was touched by them. "
            "events.jsonl names the samples of each: if they are the same few, take them out of the data; if they differ, "
            "resume from an earlier checkpoint with a lower learning rate or model.compute = 'float32'."
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything but the tensors of the copy, as plain data."""
        return {
            "phase": self.phase,
            "norms": {phase: list(values) for phase, values in self.norms.items()},
            "losses": {phase: list(values) for phase, values in self.losses.items()},
            "in_a_row": dict(self.in_a_row),
            "good_updates": self.good.updates,
        }

    def load_state_dict(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` and `good.state_tensors` gave."""
        self.phase = state["phase"]
        self.norms = {phase: list(values) for phase, values in state["norms"].items()}
        self.losses = {phase: list(values) for phase, values in state["losses"].items()}
        self.in_a_row = dict(state["in_a_row"])
        self.good.load(int(state["good_updates"]), tensors)


def loss_spread(losses: Sequence[float]) -> float:
    """How far losses usually are from their median, in nats; robust, and never so small that rounding is a spike."""
    typical = statistics.median(losses)
    deviation = statistics.median(abs(value - typical) for value in losses)
    return max(NORMAL_SPREAD * deviation, LEAST_SHARE * abs(typical), LEAST_SPREAD)
