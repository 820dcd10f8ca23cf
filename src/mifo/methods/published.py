"""Updates summed and ranked as a published code does: the [legacy] table of a recipe that names the code.

    per_gpu         LUFFY, RL with SFT loss, ReLIFT, HPT: policy terms Σ/(GPUs·L), every other term a sum of micro-batch means
    by_sequences    CHORD: means of micro-batches, weighted by their sequences of the stream
    sft_over_gpus   ReLIFT: the gradient of its SFT phases over the number of GPUs, which AdamW does not see and clipping does
    prefix_ranking  Prefix-RFT: the prefix tokens of highest entropy are those of each micro-batch

Whatever the memory here holds at once, the gradient is the same: the micro-batches of the code are simulated (`core.reduce`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from mifo.config.schema import LegacyConfig
from mifo.methods.base import Method
from mifo.methods.mixture import scaled
from mifo.types import Group, Phase, PublishedBatches, PublishedSum, Term, TopPrefixEntropy, Update

POLICY_TERMS = frozenset({"pg", "off"})


class AsPublished:
    """A method whose updates are summed as its published code sums them; in everything else the method itself."""

    def __init__(self, method: Method, legacy: LegacyConfig) -> None:
        self.method, self.legacy = method, legacy

    def __getattr__(self, name: str) -> Any:
        return getattr(self.method, name)

    def updates(self, phase: Phase, groups: Sequence[Group]) -> list[Update]:
        """Those of the method, with the sums of the code."""
        updates = self.method.updates(phase, groups)
        if phase.name == "sft":
            return scaled(updates, 1.0 / (self.legacy.gpus or 1)) if self.legacy.sft_over_gpus else updates
        if self.legacy.reducer == "update" and self.legacy.prefix_ranking == "update":
            return updates
        return [replace(update, terms=tuple(map(self._summed, update.terms))) for update in updates]

    def _summed(self, term: Term) -> Term:
        legacy = self.legacy
        assert legacy.gpus is not None
        assert legacy.micro_batch_tokens is not None
        if legacy.prefix_ranking == "within_micro_batches":
            if not isinstance(term.select, TopPrefixEntropy):
                return term
            within = PublishedBatches(gpus=legacy.gpus, tokens=legacy.micro_batch_tokens)
            return replace(term, select=replace(term.select, within=within))
        by_gpu: Any = "constant" if term.name in POLICY_TERMS else "sum"
        kind = "sequences" if legacy.reducer == "by_sequences" else by_gpu
        return replace(term, published=PublishedSum(kind=kind, gpus=legacy.gpus, tokens=legacy.micro_batch_tokens))
