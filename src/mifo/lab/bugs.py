"""What the two bugs of the corrected-baseline paper cost an SFT run (S2 §2, §4, Figure 2 and Table 2): `mifo probe bugs`.

SFT on a recipe's model and data, once right and once with each bug and with both, the same seeds, data and order. Everything but
the reduction is the engine's (`lab.bug_learner`). The paper has four configurations of one code; here the right one, the two
readings of the dropped micro-batches, the two means of means, and both bugs together as its baseline had them.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mifo.config.schema import Config
from mifo.errors import ConfigError
from mifo.lab.arena_statistics import (
    Estimate,
    paired_difference,
    score_table,
    share_interval,
    shared_problems,
)
from mifo.lab.bug_learner import Bug
from mifo.lab.bug_run import HELD_OUT
from mifo.lab.claims import SAME_LOSS, Claim, Side, difference_over_seeds, over_seeds, ratio
from mifo.lab.training_plan import Workplace, base_config, check_counts, sft_config, with_verdicts
from mifo.lab.trials import Trial, TrialFailure, TrialResult, run_trials
from mifo.train.checkpoint import read_json

RIGHT, LOST, FIRST, MEANS, RANKS, BOTH = (
    "correct", "first and last kept", "first only", "mean of micro-batches", "mean of ranks", "both",
)  # fmt: skip
END_SHARE = 0.25  # of the updates: where the loss at the end is read
Compare = Callable[[Mapping[int, float], Mapping[int, float]], Estimate | None]
SAME_NORM = 0.1  # a gradient norm, or a variability, that changes by less is unchanged


@dataclass(frozen=True, slots=True, kw_only=True)
class BugSettings:
    """How the runs are made. 16 demonstrations on 2 ranks of 8 keep a quarter of them, as the published 64 on 8 of 8 do."""

    seeds: int = 3
    steps: int | None = None
    """SFT updates; None: those of the recipe."""
    batch_size: int = 16
    ranks: int = 2
    micro_batches: int = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class BugRun:
    """One run. `losses` and `norms` are what it reported at each update; `held_out_loss` is in nats a token."""

    variant: str
    seed: int
    losses: tuple[float, ...]
    norms: tuple[float, ...]
    held_out_loss: float | None
    by_problem: Mapping[str, float]

    @property
    def accuracy(self) -> float:
        """On held-out problems, after training."""
        return sum(self.by_problem.values()) / len(self.by_problem)

    @property
    def loss(self) -> float:
        """Reported, mean over the last quarter of the updates."""
        return statistics.fmean(self.losses[-max(1, round(END_SHARE * len(self.losses))) :])

    @property
    def norm(self) -> float:
        """Reported gradient norm before clipping, mean over the updates that were taken: those where it was finite."""
        norms = [norm for norm in self.norms if math.isfinite(norm)]
        return statistics.fmean(norms) if norms else math.nan

    @property
    def variability(self) -> float:
        """Of the reported loss from one update to the next, as a share of it: sd(log l_t − log l_{t−1})/√2 over the last three
        quarters of the updates. Neither its trend nor its level enters much: a bug that leaves the loss high is no noise."""
        logs = [math.log(loss) for loss in self.losses[len(self.losses) // 4 :] if loss > 0.0]
        steps = [after - before for before, after in itertools.pairwise(logs)]
        return statistics.pstdev(steps) / 2**0.5 if steps else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BugRow:
    """A variant over its seeds. Differences and ratios are to the correct runs of the same seeds; None for these themselves."""

    variant: str
    seeds: int
    accuracy: Estimate
    accuracy_difference: Estimate | None
    loss: Estimate | None
    loss_difference: Estimate | None
    held_out_loss: Estimate | None
    norm: Estimate | None
    norm_ratio: Estimate | None
    variability_ratio: Estimate | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bugs:
    """All runs, a row for each variant, and the paper's claims."""

    settings: BugSettings
    runs: tuple[BugRun, ...]
    table: tuple[BugRow, ...]
    claims: tuple[Claim, ...]
    notes: tuple[str, ...]
    failures: tuple[TrialFailure, ...]

    def record(self) -> dict[str, Any]:
        """Plain data."""
        return with_verdicts(asdict(self), self.claims, self.failures)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each run."""
        return [
            {
                "variant": run.variant,
                "seed": run.seed,
                "accuracy": run.accuracy,
                "held_out_loss": run.held_out_loss,
                "loss_at_end": run.loss,
                "loss_variability": run.variability,
                "gradient_norm": run.norm,
            }
            for run in self.runs
        ]


def variants(settings: BugSettings) -> dict[str, Bug]:
    """The reductions that are compared, by name."""
    right = Bug(ranks=settings.ranks, micro_batches=settings.micro_batches)
    return {
        RIGHT: right,
        RANKS: replace(right, means="rank"),
        MEANS: replace(right, means="micro_batch"),
        LOST: replace(right, dropped="first_last"),
        FIRST: replace(right, dropped="first"),
        BOTH: replace(right, dropped="first_last", means="micro_batch"),
    }


def bugs(config: Config, workplace: Workplace, settings: BugSettings | None = None) -> Bugs | None:
    """Train every variant with every seed, and compare.

    Args:
        config: a recipe's; its model, data, SFT optimizer and evaluation are used.
        workplace: a folder that holds some of these runs already is gone on with.
        settings: seeds, steps, and how an update is cut.

    Returns:
        What was measured; None where `workplace.stop` was asked before the end, or no correct run finished.

    Raises:
        ConfigError: a setting is wrong or the bugs could not show with it.
    """
    settings = settings or BugSettings()
    trials = bug_trials(config, settings)
    done = run_trials(
        list(trials.values()),
        workplace.folder,
        jobs=workplace.jobs,
        threads=workplace.threads,
        stop=workplace.stop,
        say=workplace.say,
    )
    runs = tuple(
        read_bug_run(name, done.results[trial.name])
        for (name, _), trial in trials.items()
        if trial.name in done.results
    )
    if done.stopped or not any(run.variant == RIGHT for run in runs):
        return None
    return compare_bugs(settings, runs, done.failures)


def bug_trials(config: Config, settings: BugSettings) -> dict[tuple[str, int], Trial]:
    """The runs by variant and seed, from a recipe's configuration.

    Raises:
        ConfigError: a setting is wrong or the bugs could not show with it.
    """
    base = base_config(config)
    _check(settings)
    return {
        (name, seed): _trial(base, name, bug, seed, settings)
        for seed in range(settings.seeds)
        for name, bug in variants(settings).items()
    }


def _check(settings: BugSettings) -> None:
    """The bugs can show.

    Raises:
        ConfigError: names the flag.
    """
    check_counts(seeds=settings.seeds, ranks=settings.ranks, batch_size=settings.batch_size)
    if settings.micro_batches < 3:
        raise ConfigError(
            f"--micro-batches {settings.micro_batches}: with fewer than 3 the first and the last are all of them, and nothing is "
            "dropped. Give at least 3."
        )
    pieces = settings.ranks * settings.micro_batches
    if settings.batch_size % pieces:
        raise ConfigError(
            f"--batch-size {settings.batch_size} does not come out even in {settings.ranks} ranks of {settings.micro_batches} "
            f"micro-batches. Give a multiple of {pieces}."
        )


def _trial(config: Config, name: str, bug: Bug, seed: int, settings: BugSettings) -> Trial:
    steps = settings.steps or config.train.steps
    own = sft_config(config, steps=steps, batch_size=settings.batch_size, seed=seed)
    sft = own.method.sft if own.method.name == "sft" else None
    assert sft is not None
    if sft.normalizer != "token":
        raise ConfigError(
            f"method.sft.normalizer = '{sft.normalizer}': a mean of means distorts a mean over tokens. Name a recipe with "
            "'token', the default."
        )
    options: list[tuple[str, str | None]] = [("--dropped", bug.dropped), ("--means", bug.means)]
    options += [("--ranks", str(bug.ranks)), ("--micro-batches", str(bug.micro_batches))]
    words = [word for flag, value in options if value is not None for word in (flag, value)]
    folder = f"{name.replace(' ', '-')}-seed{seed}"
    return Trial(name=folder, config=own, command=("mifo.lab.bug_run", *words))


def read_bug_run(variant: str, result: TrialResult) -> BugRun:
    """What a finished run of a variant reported."""
    return BugRun(
        variant=variant,
        seed=result.seed,
        losses=tuple(update["loss"] for update in result.updates),
        norms=tuple(update["grad_norm"] for update in result.updates),
        held_out_loss=read_json(result.folder / HELD_OUT)["loss"],
        by_problem=result.after.by_problem,
    )


# --- what they say -------------------------------------------------------------------------------------------------------


def compare_bugs(settings: BugSettings, runs: Sequence[BugRun], failures: Sequence[TrialFailure] = ()) -> Bugs:
    """Rows and claims of some runs; what needs a variant that is not among them is None."""
    by_variant = {
        name: {run.seed: run for run in runs if run.variant == name}
        for name in variants(settings)
        if any(run.variant == name for run in runs)
    }
    right = by_variant.get(RIGHT, {})
    table = {name: _row(name, own, right) for name, own in by_variant.items()}
    return Bugs(
        settings=settings,
        runs=tuple(runs),
        table=tuple(table.values()),
        claims=tuple(_claims(by_variant, table)),
        notes=tuple(_notes(right)),
        failures=tuple(failures),
    )


def _notes(right: Mapping[int, BugRun]) -> Iterator[str]:
    """What limits what can be seen."""
    if len(right) == 1:
        yield "One seed says nothing of another: losses and norms have no intervals."
    if right and not any(run.accuracy for run in right.values()):
        yield "The correct runs solved no held-out problem, so accuracies say nothing of the bugs: give more --steps."


def _row(name: str, own: Mapping[int, BugRun], right: Mapping[int, BugRun]) -> BugRow:
    seeds, scores = sorted(own), _scores(own)

    def beside(figure: str, how: Compare) -> Estimate | None:
        first, second = ({s: getattr(run, figure) for s, run in runs.items()} for runs in (own, right))
        return None if name == RIGHT else how(first, second)

    held_out = {seed: run.held_out_loss for seed, run in own.items() if run.held_out_loss is not None}
    return BugRow(
        variant=name,
        seeds=len(own),
        accuracy=share_interval(score_table(scores, seeds, shared_problems([scores]))),
        accuracy_difference=None if name == RIGHT else paired_difference(scores, _scores(right)),
        loss=over_seeds({seed: run.loss for seed, run in own.items()}),
        loss_difference=beside("loss", difference_over_seeds),
        held_out_loss=over_seeds(held_out),
        norm=over_seeds({seed: run.norm for seed, run in own.items()}),
        norm_ratio=beside("norm", ratio),
        variability_ratio=beside("variability", ratio),
    )


def _scores(runs: Mapping[int, BugRun]) -> dict[int, Mapping[str, float]]:
    return {seed: run.by_problem for seed, run in runs.items()}


def _claims(runs: Mapping[str, Mapping[int, BugRun]], table: Mapping[str, BugRow]) -> Iterator[Claim]:
    """The paper's order of effects; "dropped" is what the code did, first and last kept."""

    def gained(worse: str, better: str) -> Estimate | None:
        if not {better, worse} <= runs.keys():
            return None
        return paired_difference(_scores(runs[worse]), _scores(runs[better]))

    def figure(name: str, field: str) -> Estimate | None:
        found: Estimate | None = getattr(table[name], field) if name in table else None
        return found

    for text, paper, measured in (
        ("dropped micro-batches cost accuracy", "Table 2: 54.0 → 49.1", gained(LOST, RIGHT)),
        ("a mean of means costs accuracy", "Table 2: 54.0 → 53.4", gained(MEANS, RIGHT)),
        ("dropped micro-batches cost more than a mean of means", "Table 2: 53.4 against 49.1", gained(LOST, MEANS)),
        ("both together cost more than dropped micro-batches", "Table 2: 49.1 → 48.3", gained(BOTH, LOST)),
    ):
        yield Claim(text=text, paper=paper, unit="points", side="below", measured=measured)
    reported: tuple[tuple[str, Side, str, str, str], ...] = (
        ("dropped micro-batches raise the loss", "above", "left", LOST, "loss_difference"),
        ("a mean of means makes the reported loss more variable", "above", "left", MEANS, "variability_ratio"),
        ("a mean of means does not shift the reported loss", "within", "left", MEANS, "loss_difference"),
        ("dropped micro-batches leave its variability as it is", "within", "left", LOST, "variability_ratio"),
        ("dropped micro-batches suppress the gradient norm", "below", "right", LOST, "norm_ratio"),
        ("a mean of means leaves the gradient norm as it is", "within", "right", MEANS, "norm_ratio"),
    )
    for text, side, place, variant, field in reported:
        is_ratio = field.endswith("ratio")
        yield Claim(
            text=text,
            paper=f"Figure 2, {place}",
            unit="ratio" if is_ratio else "nats",
            side=side,
            bound=1.0 if is_ratio else 0.0,
            margin=(SAME_NORM if is_ratio else SAME_LOSS) if side == "within" else 0.0,
            measured=figure(variant, field),
        )
