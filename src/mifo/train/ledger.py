"""What a run spent: prompts, tokens, FLOPs by the 2ND / 6ND rule, wall time per part (S2 App. B)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mifo.config.schema import TrainConfig

FLOPS_PER_GENERATED, FLOPS_PER_TRAINED = 2, 6  # × parameters × tokens
FLOPS_PER_PASS = 2  # without gradients of weights
FLOPS_PER_FROZEN = 4  # forward, and backward through weights that get no gradients of their own


@dataclass(slots=True)
class Ledger:
    """Running totals over the whole run, resumed sessions included.

    Token counts are response tokens unless they say `fed`, which counts prompt and response as they went through the
    model; groups skipped because nothing could be learned from them are not fed. A scorer is a second model (critic, process
    reward model): `scored_fed_tokens` went through it, or its reference, to be scored, `scorer_fed_tokens` to be learned from.
    """

    parameters: int
    scorer_parameters: int = 0
    rl_steps: int = 0
    sft_steps: int = 0
    updates: int = 0
    intervals: int = 0
    problems_sampled: int = 0
    unique_problems: int = 0
    demonstrations_used: int = 0
    unique_demonstrations: int = 0
    generated_tokens: int = 0
    prefilled_tokens: int = 0
    rl_tokens: int = 0
    rl_fed_tokens: int = 0
    sft_tokens: int = 0
    sft_fed_tokens: int = 0
    scorer_updates: int = 0
    scored_fed_tokens: int = 0
    scorer_fed_tokens: int = 0
    adapter_fed_tokens: int = 0  # of sft_fed_tokens: those that trained adapters
    adapter_flops: int = 0
    calibration_fed_tokens: int = 0  # of rejuvenations, once for each pass forwards, or backwards through activations
    evaluation_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    seen_problems: set[str] = field(default_factory=set)
    seen_demonstrations: set[str] = field(default_factory=set)

    @property
    def generation_flops(self) -> float:
        """2·N·D over tokens prefilled and generated for training; evaluation is not counted."""
        return float(FLOPS_PER_GENERATED * self.parameters * (self.generated_tokens + self.prefilled_tokens))

    @property
    def training_flops(self) -> float:
        """6·N·D over tokens fed to forward and backward passes of the policy, and what adapters, scorer and calibration cost."""
        own = self.rl_fed_tokens + self.sft_fed_tokens - self.adapter_fed_tokens
        others = self.adapter_flops + self.scorer_flops + self.calibration_flops
        return float(FLOPS_PER_TRAINED * self.parameters * own + others)

    @property
    def calibration_flops(self) -> float:
        """2·N·D over tokens of rejuvenations' passes, a backward pass through activations alone like a forward one."""
        return float(FLOPS_PER_PASS * self.parameters * self.calibration_fed_tokens)

    @property
    def scorer_flops(self) -> float:
        """2·N·D over tokens that were scored and 6·N·D over those learned from, N the scorer's parameters."""
        fed = FLOPS_PER_GENERATED * self.scored_fed_tokens + FLOPS_PER_TRAINED * self.scorer_fed_tokens
        return float(self.scorer_parameters * fed)

    @property
    def flops(self) -> float:
        """All FLOPs of training: generation and learning."""
        return self.generation_flops + self.training_flops

    @property
    def tokens(self) -> int:
        """Response tokens generated, and those that entered an update, counted once for each."""
        return self.generated_tokens + self.rl_tokens + self.sft_tokens

    def spent(self, train: TrainConfig, minutes: float) -> str | None:
        """The budget of the [train] table that is used up, by its setting; `minutes` is the run's wall time."""
        used = {"minutes": minutes, "max_flops": self.flops, "max_tokens": self.tokens}
        budgets = {"minutes": train.minutes, "max_flops": train.max_flops, "max_tokens": train.max_tokens}
        return next((name for name, budget in budgets.items() if budget is not None and used[name] >= budget), None)

    @contextlib.contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the wall time of a block to a part."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - start

    def trained_adapters(self, tokens: int, elements: int) -> None:
        """Count tokens fed to train adapters of so many elements: 4·N·D, as the weights get no gradients, and 6·D·elements."""
        self.adapter_fed_tokens += tokens
        self.adapter_flops += (FLOPS_PER_FROZEN * self.parameters + FLOPS_PER_TRAINED * elements) * tokens

    def saw_problems(self, ids: list[str]) -> None:
        """Count sampled problems, all and unique."""
        self.problems_sampled += len(ids)
        self.seen_problems.update(ids)
        self.unique_problems = len(self.seen_problems)

    def used_demonstrations(self, ids: list[str]) -> None:
        """Count demonstrations learned from, all and unique."""
        self.demonstrations_used += len(ids)
        self.seen_demonstrations.update(ids)
        self.unique_demonstrations = len(self.seen_demonstrations)

    def summary(self) -> dict[str, Any]:
        """The totals as plain data, for ledger.json."""
        plain = self.state_dict()
        del plain["seen_problems"], plain["seen_demonstrations"]
        names = ("generation_flops", "training_flops", "scorer_flops", "calibration_flops")
        return plain | {name: getattr(self, name) for name in names}

    def state_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        plain = asdict(self)
        return plain | {name: sorted(plain[name]) for name in ("seen_problems", "seen_demonstrations")}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        for name, value in state.items():
            setattr(self, name, set(value) if name.startswith("seen_") else value)
