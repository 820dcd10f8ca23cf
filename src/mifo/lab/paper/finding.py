"""A finding: which runs it needs, and what they say about its claims."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mifo.errors import CheckpointError
from mifo.lab.arena_statistics import Estimate, Runs, paired_difference
from mifo.lab.claims import Claim, Side, Verdict, contrast, overall
from mifo.lab.paper.plan import Plan
from mifo.lab.trials import Trial, TrialResult
from mifo.train.checkpoint import read_json
from mifo.train.storage import Storage, replace_file


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The finished runs of a finding, by their names without the seed.

    Figures of a run that failed are missing for its seed; where a name has no finished run at all, what asks for it gets None
    or nothing.
    """

    plan: Plan
    results: Mapping[str, TrialResult]
    cache: Path
    """Folder of measurements that take long: they are made once."""

    def runs(self, name: str) -> dict[int, TrialResult]:
        """By seed."""
        named = {seed: self.results.get(f"{name}-seed{seed}") for seed in self.plan.seeds}
        return {seed: result for seed, result in named.items() if result is not None}

    def scores(self, name: str, label: str = "after") -> Runs:
        """Verdicts on single problems by seed."""
        return {seed: result.evaluation(label).by_problem for seed, result in self.runs(name).items()}

    def accuracy(self, name: str, label: str = "after") -> dict[int, float]:
        """Share of held-out problems solved, by seed."""
        return {seed: result.evaluation(label).accuracy for seed, result in self.runs(name).items()}

    def difference(self, name: str, other: str, label: str = "after", other_label: str = "after") -> Estimate | None:
        """Accuracy of one less that of another, paired by seed and problem; None without runs of both."""
        mine, theirs = self.scores(name, label), self.scores(other, other_label)
        return paired_difference(mine, theirs) if mine and theirs else None

    def contrast(self, weights: Mapping[tuple[str, str], float]) -> Estimate | None:
        """Weighted sum of accuracies, such as a difference of differences, paired by seed and problem.

        Args:
            weights: by run and label of its measurement, ("rl", "after").

        Returns:
            With the interval over seeds and problems; None where a run is missing in every seed.
        """
        return contrast([(weight, self.scores(*key)) for key, weight in weights.items()])

    def each(self, name: str, figure: Callable[[TrialResult], float | None]) -> dict[int, float]:
        """A figure of every run of a name, where it has one."""
        found = {seed: figure(result) for seed, result in self.runs(name).items()}
        return {seed: value for seed, value in found.items() if value is not None}

    def export(self, name: str, seed: int) -> str:
        """The model that a run ended with.

        Raises:
            CheckpointError: it was not kept.
        """
        result = self.results[f"{name}-seed{seed}"]
        if result.export is None:
            raise CheckpointError(f"{result.folder} has no export any more. Remove the folder to train it again.")
        return str(result.export)

    def once(self, key: str, runs: Sequence[str], measure: Callable[[], Any]) -> Any:
        """A measurement as plain data: made now, or read where it was made before of these very runs.

        Args:
            key: of the measurement, a file name without ending.
            runs: what it measures; a run that was trained again is measured again.
            measure: makes it.
        """
        path, stamp = self.cache / f"{key}.json", self._stamp(runs)
        if path.is_file():
            stored = read_json(path)
            if stored.get("runs") == stamp:
                return stored["found"]
        found = measure()
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(Storage(), path, json.dumps({"runs": stamp, "found": found}).encode("utf-8"))
        return found

    def _stamp(self, runs: Sequence[str]) -> str:
        """A hash of how the runs ended: the time that training took is of one training alone."""
        ends = [dict(self.results[name].summary) for name in runs if name in self.results]
        return hashlib.sha256(json.dumps(ends, sort_keys=True).encode("utf-8")).hexdigest()


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One row of the page.

    Attributes:
        name: as --only has it.
        source: paper and table or figure; S0 MIFO, S2 corrected SFT-then-RL, S3 rejuvenation, S4 non-decoupling.
        claim: what the paper says, in a sentence.
        setting: what stands for the paper's experiment here, in a sentence.
        trials: the runs it needs.
        judge: claims from the finished runs.
        in_arena: methods of an arena whose runs can stand for those needed, by the names used here; empty: none can.
        remarks: what the same runs say beside the paper's claims, in sentences.
    """

    name: str
    source: str
    claim: str
    setting: str
    trials: Callable[[Plan], Sequence[Trial]]
    judge: Callable[[Evidence], Sequence[Claim]]
    in_arena: Mapping[str, str] = field(default_factory=dict)
    remarks: Callable[[Evidence], Sequence[str]] = lambda evidence: ()


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A finding with what was found: `runs` stand behind it, which spent `flops` and `seconds` in all; others `failed`.

    `setting` is what was run, which an arena's runs change. `machine` is where it was judged.
    """

    finding: Finding
    claims: tuple[Claim, ...]
    notes: tuple[str, ...]
    runs: int
    flops: float
    seconds: float
    failed: int = 0
    setting: str = ""
    machine: str = ""

    @property
    def verdict(self) -> Verdict:
        """Over all its claims."""
        return overall(self.claims)


def no_reward(evidence: Evidence, names: Sequence[str]) -> list[str]:
    """Notes on runs whose RL had nothing to learn from: all answers wrong, or all right."""
    notes = []
    for name in names:
        shares = evidence.each(name, lambda run: run.rewarded)
        for share, how in ((0.0, "wrong"), (1.0, "right")):
            seeds = [str(seed) for seed, value in shares.items() if value == share]
            if seeds:
                notes.append(f"{name}: all rollouts were {how} (seed {', '.join(seeds)}), so RL learned nothing")
    return notes


def per_seed(make: Callable[[Plan, int], Sequence[Trial]]) -> Callable[[Plan], Sequence[Trial]]:
    """The runs of every seed, seed by seed."""
    return lambda plan: [trial for seed in plan.seeds for trial in make(plan, seed)]


def accuracy_claim(
    evidence: Evidence, text: str, paper: str, first: str, second: str, side: Side = "above", bound: float = 0.0
) -> Claim:
    """That one run ends with a higher (or lower) accuracy than another."""
    return Claim(
        text=text, paper=paper, unit="points", side=side, bound=bound, measured=evidence.difference(first, second)
    )


def ratio_claim(text: str, paper: str, measured: Estimate | None, side: Side = "above") -> Claim:
    """That a ratio lies above (or below) one."""
    return Claim(text=text, paper=paper, unit="ratio", side=side, bound=1.0, measured=measured)
