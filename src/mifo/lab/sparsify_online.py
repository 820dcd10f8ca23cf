"""What dropping a random share of each gradient costs SFT and RL (S0 §2.2, Figure 2): `mifo probe sparsify --online`.

SFT and RL from one start, with train.gradient_drop over a grid of rates, each with several seeds, measured along training. Rate 0
is training as it is, and always there: what a rate costs is paired with it by seed and problem.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from mifo.config.schema import Config
from mifo.errors import ConfigError
from mifo.lab.arena_statistics import (
    Estimate,
    paired_difference,
    score_table,
    share_interval,
    shared_problems,
)
from mifo.lab.claims import Claim, contrast
from mifo.lab.training_plan import Workplace, base_config, check_counts, rl_config, sft_config, with_verdicts
from mifo.lab.trials import Evaluation, Trial, TrialFailure, TrialResult, run_trials

Kind = Literal["sft", "rl"]
KINDS: tuple[Kind, ...] = ("sft", "rl")
LITTLE = 0.02  # accuracy that SFT may lose and still be "hardly worse"; the paper's gap is 1.07 points
POINTS = 6  # measurements along a run, the first one before it


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineSettings:
    """The paper's rate is 0.5. `start` names another model than the recipe's, `warmup` SFT steps come before both."""

    rates: tuple[float, ...] = (0.5,)
    seeds: int = 3
    steps: int | None = None
    """Steps of each run; None: those of the recipe."""
    batch_size: int = 16
    start: str | None = None
    warmup: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineRun:
    """One run: its measurements from before training to after it, and, of RL, the share of groups that it could learn from."""

    kind: Kind
    rate: float
    seed: int
    points: tuple[Evaluation, ...]
    mixed_groups: float | None

    @property
    def final(self) -> Mapping[str, float]:
        """Verdicts on single problems after training."""
        return self.points[-1].by_problem


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineRow:
    """A kind of training at a rate: accuracy along it over seeds, and what the rate cost at the end; None at rate 0."""

    kind: Kind
    rate: float
    seeds: int
    curve: tuple[tuple[int, Estimate], ...]
    cost: Estimate | None

    @property
    def accuracy(self) -> Estimate:
        """After training."""
        return self.curve[-1][1]


@dataclass(frozen=True, slots=True, kw_only=True)
class OnlineSparsification:
    """All runs, a row for each kind and rate, and the paper's claims."""

    settings: OnlineSettings
    runs: tuple[OnlineRun, ...]
    table: tuple[OnlineRow, ...]
    claims: tuple[Claim, ...]
    notes: tuple[str, ...]
    failures: tuple[TrialFailure, ...]

    def record(self) -> dict[str, Any]:
        """Plain data."""
        return with_verdicts(asdict(self), self.claims, self.failures)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each measurement of each run."""
        return [
            {"kind": run.kind, "rate": run.rate, "seed": run.seed, "step": point.step, "accuracy": point.accuracy}
            for run in self.runs
            for point in run.points
        ]


def sparsify_online(
    config: Config, workplace: Workplace, settings: OnlineSettings | None = None
) -> OnlineSparsification | None:
    """Train SFT and RL at every rate with every seed, and compare.

    Args:
        config: a recipe's; its model, data, rollouts, policy gradient and optimizers are used.
        workplace: a folder that holds some of these runs already is gone on with.
        settings: rates, seeds and steps.

    Returns:
        What was measured; None where `workplace.stop` was asked before the end, or no run finished.

    Raises:
        ConfigError: a setting is wrong.
    """
    settings = settings or OnlineSettings()
    check_counts(seeds=settings.seeds, batch_size=settings.batch_size)
    if not settings.rates or any(not 0.0 < rate < 1.0 for rate in settings.rates):
        raise ConfigError(f"--rates {settings.rates}: give shares between 0 and 1; 0 is always there.")
    base = base_config(config, start=settings.start)
    rates = (0.0, *sorted(set(settings.rates)))
    trials = {
        (kind, rate, seed): _trial(base, kind, rate, seed, settings)
        for seed in range(settings.seeds)
        for rate in rates
        for kind in KINDS
    }
    done = run_trials(
        list(trials.values()),
        workplace.folder,
        jobs=workplace.jobs,
        threads=workplace.threads,
        stop=workplace.stop,
        say=workplace.say,
    )
    runs = tuple(
        _read(kind, rate, seed, found)
        for (kind, rate, seed), trial in trials.items()
        if (found := done.results.get(trial.name)) is not None
    )
    return None if done.stopped or not runs else compare_online(settings, runs, done.failures)


def _trial(base: Config, kind: Kind, rate: float, seed: int, settings: OnlineSettings) -> Trial:
    steps, warm = settings.steps or base.train.steps, None
    if settings.warmup:
        sft = sft_config(base, steps=settings.warmup, batch_size=settings.batch_size, seed=seed)
        warm = Trial(name=f"warmup-seed{seed}", config=sft)
    if kind == "rl":
        config = rl_config(base, steps=steps, seed=seed)
    else:
        config = sft_config(base, steps=steps, batch_size=settings.batch_size, seed=seed)
    every = max(1, round(steps / (POINTS - 1)))
    config = replace(
        config,
        train=replace(config.train, gradient_drop=rate),
        evaluation=replace(config.evaluation, every_steps=every if every < steps else None),
    )
    return Trial(name=f"{kind}-drop{rate:g}-seed{seed}", config=config, after=warm)


def _read(kind: Kind, rate: float, seed: int, found: TrialResult) -> OnlineRun:
    last = found.after
    points = tuple(
        point for point in found.along if point.step < last.step or point == last
    )  # the last step's is "after"
    return OnlineRun(kind=kind, rate=rate, seed=seed, points=points, mixed_groups=found.mixed_groups)


# --- what they say -------------------------------------------------------------------------------------------------------

Scores = Mapping[int, Mapping[str, float]]


def compare_online(
    settings: OnlineSettings, runs: Sequence[OnlineRun], failures: Sequence[TrialFailure] = ()
) -> OnlineSparsification:
    """Rows and claims of some runs."""
    by_cell: dict[tuple[Kind, float], list[OnlineRun]] = {}
    for run in runs:
        by_cell.setdefault((run.kind, run.rate), []).append(run)
    final = {cell: {run.seed: run.final for run in own} for cell, own in by_cell.items()}
    table = [
        OnlineRow(
            kind=kind,
            rate=rate,
            seeds=len(own),
            curve=tuple(_curve(own)),
            cost=paired_difference(final[kind, 0.0], final[kind, rate]) if rate and (kind, 0.0) in final else None,
        )
        for (kind, rate), own in sorted(by_cell.items(), key=lambda cell: (KINDS.index(cell[0][0]), cell[0][1]))
    ]
    learned = any(run.mixed_groups for run in runs if run.kind == "rl")
    note = (
        "RL had no signal: the rewards of every group were equal. Begin with an able model (--start) or SFT (--warmup)."
    )
    return OnlineSparsification(
        settings=settings,
        runs=tuple(runs),
        table=tuple(table),
        claims=tuple(_claims(table, final, learned=learned)),
        notes=() if learned else (note,),
        failures=tuple(failures),
    )


def _curve(runs: Sequence[OnlineRun]) -> Iterator[tuple[int, Estimate]]:
    """Accuracy over the seeds at each step that all of them were measured at."""
    steps = set.intersection(*({point.step for point in run.points} for run in runs))
    for step in sorted(steps):
        scores = {run.seed: next(p.by_problem for p in run.points if p.step == step) for run in runs}
        yield step, share_interval(score_table(scores, sorted(scores), shared_problems([scores])))


def extra_cost(final: Mapping[tuple[Kind, float], Scores], rate: float) -> Estimate | None:
    """What a rate costs RL less what it costs SFT, paired by seed and problem over all four runs; None where one is missing."""
    cells: list[tuple[float, tuple[Kind, float]]] = [
        (1.0, ("rl", 0.0)), (-1.0, ("rl", rate)), (-1.0, ("sft", 0.0)), (1.0, ("sft", rate)),
    ]  # fmt: skip
    return contrast([(weight, final.get(cell, {})) for weight, cell in cells])


def _claims(
    table: Sequence[OnlineRow], final: Mapping[tuple[Kind, float], Scores], *, learned: bool
) -> Iterator[Claim]:
    """Figure 2 at each rate, as points of accuracy lost."""
    undecided = "" if learned else "RL had no signal"
    for rate in sorted({row.rate for row in table if row.rate}):
        cost = {row.kind: row.cost for row in table if row.rate == rate}
        share = f"{100 * rate:g} % of each gradient"
        yield Claim(
            text=f"SFT hardly suffers without {share}",
            paper="Figure 2: 1.07 points lost",
            unit="points",
            side="within",
            margin=LITTLE,
            measured=cost.get("sft"),
        )
        yield Claim(
            text=f"RL suffers without {share}",
            paper="Figure 2: 4.23 points lost",
            unit="points",
            side="above",
            measured=cost.get("rl"),
            undecided=undecided,
        )
        yield Claim(
            text=f"RL suffers more than SFT without {share}",
            paper="Figure 2: 4.23 against 1.07",
            unit="points",
            side="above",
            measured=extra_cost(final, rate),
            undecided=undecided,
        )
