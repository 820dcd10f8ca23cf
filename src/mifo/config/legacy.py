"""What a published code does that its result rests on and that nobody should do anew: the [legacy] table.

Off unless a recipe names the code. It is no flag, it holds only with the method (or loss) of that code, it is said at the start
of a run and written into its summary. docs/methods.md says what each code does and which defects are not rebuilt.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from mifo.config.bounds import Count, Positive


@dataclass(frozen=True, kw_only=True)
class LegacyConfig:
    """Defects of a published code, for runs that compare with its figures alone; written in a recipe, never as a flag."""

    name: Literal["none", "luffy", "rl_with_sft", "relift", "hpt", "chord", "psft", "prefix_rft"] = "none"
    """Whose code; only with the method (or loss) of that name. With none, nothing else can be set here."""
    reducer: Literal["update", "per_gpu", "by_sequences"] = "update"
    """update: one denominator; per_gpu: Σ/(GPUs·L) and sums of micro-batch means; by_sequences: means weighted by sequences."""
    gpus: Count | None = None
    """GPUs that the published code ran on."""
    micro_batch_tokens: Count | None = None
    """Most tokens of a micro-batch on one of them; with it the sums above are simulated, whatever fits into memory here."""
    prefix_ranking: Literal["update", "within_micro_batches"] = "update"
    """Rank entropies of prefix tokens over the whole update, or within each micro-batch above (Prefix-RFT)."""
    sft_over_gpus: bool = False
    """Divide the gradient of SFT phases by the number of GPUs (ReLIFT)."""
    skip_above_norm: Positive | None = None
    """Skip updates whose gradient norm, before clipping, is above this (HPT: 80)."""
    append_end: bool = True
    """End demonstrations with the end token; false leaves it out (PSFT)."""
    require_thought_end: bool = False
    """Grade responses without `</think>` as wrong, whatever they answer (LUFFY, ReLIFT)."""


def in_force(legacy: LegacyConfig) -> dict[str, Any] | None:
    """The settings that differ from their defaults, the name among them; None where nothing is legacy."""
    default = LegacyConfig()
    names = [f.name for f in dataclasses.fields(legacy)]
    return {n: getattr(legacy, n) for n in names if getattr(legacy, n) != getattr(default, n)} or None


def warning(legacy: LegacyConfig) -> str:
    """What a run with such settings says at its start."""
    listed = ", ".join(f"{name} = {value}" for name, value in (in_force(legacy) or {}).items() if name != "name")
    return (
        f"legacy.name = '{legacy.name}': this run does on purpose what the published code does ({listed}; see docs/methods.md). "
        "Its figures compare with those of that code, not with other methods here."
    )
