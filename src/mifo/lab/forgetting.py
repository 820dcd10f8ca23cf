"""What a few steps of each objective after RL do to its accuracy (S0 §2.1, Table 2): `mifo probe forgetting`.

N steps of RL, then M steps of each objective from the same checkpoint: RL going on, SFT with each loss, on the tokens of highest
entropy, with what RL moved most frozen, and MIFO's SFT, which does both; LUFFY, SRFT and ReLIFT, as the paper has them; and any
recipe's method. Every objective begins with fresh optimizers and data of its own order; the paper says nothing of either.
"""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from mifo.config.load import load_config, recipe_names
from mifo.config.schema import Config, MifoMethod
from mifo.errors import ConfigError
from mifo.lab.arena_statistics import Estimate, paired_difference
from mifo.lab.claims import KEPT, Claim, Side
from mifo.lab.training_plan import (
    Loss,
    Workplace,
    base_config,
    check_counts,
    mixed_config,
    rl_config,
    sft_config,
    with_verdicts,
)
from mifo.lab.trials import TRAIN, Trial, TrialFailure, TrialResult, Trials, run_trials

RL, CE, SELECTED, FROZEN, MIFO = "rl", "ce", "es", "pf", "mifo"
LOSSES: Mapping[str, Loss] = {CE if loss == "cross_entropy" else loss: loss for loss in typing.get_args(Loss)}
MIXED: Mapping[str, str] = {"luffy": "−12.6", "srft": "−8.6", "relift": "−11.1"}  # with the paper's changes
OBJECTIVES = (RL, CE, "dft", SELECTED, FROZEN, MIFO, *MIXED)
OTHER_ORDER = 100_000  # added to the seed of what follows RL: other problems first, other samples


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgettingSettings:
    """The paper's 50 and 10 steps; `start` names another model than the recipe's, `warmup` SFT steps come before RL."""

    objectives: tuple[str, ...] = OBJECTIVES
    seeds: int = 3
    rl_steps: int = 50
    steps: int = 10
    batch_size: int = 16
    start: str | None = None
    warmup: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgettingRun:
    """One objective after one seed's RL, with verdicts on single problems before it and after it."""

    objective: str
    seed: int
    before: Mapping[str, float]
    after: Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class RlRun:
    """The RL before them: accuracy around it, that of its rollouts, and the share of groups that it could learn from."""

    seed: int
    before: float
    after: float
    rewarded: float
    mixed_groups: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgettingRow:
    """An objective over its seeds: accuracies before and after, their paired difference, and that to cross-entropy's."""

    objective: str
    seeds: int
    before: float
    after: float
    change: Estimate | None
    against_ce: Estimate | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Forgetting:
    """All runs, a row for each objective, and the paper's claims."""

    settings: ForgettingSettings
    rl: tuple[RlRun, ...]
    runs: tuple[ForgettingRun, ...]
    table: tuple[ForgettingRow, ...]
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
                "objective": run.objective,
                "seed": run.seed,
                "accuracy_after_rl": _mean(run.before),
                "accuracy_after": _mean(run.after),
                "change": _mean(run.after) - _mean(run.before),
            }
            for run in self.runs
        ]


def forgetting(config: Config, workplace: Workplace, settings: ForgettingSettings | None = None) -> Forgetting | None:
    """RL, and each objective after it, for every seed.

    Args:
        config: a recipe's; its model, data, rollouts, policy gradient, losses and optimizers are used.
        workplace: a folder that holds some of these runs already is gone on with.
        settings: objectives, seeds and steps.

    Returns:
        What was measured; None where `workplace.stop` was asked before the end, or nothing after RL finished.

    Raises:
        ConfigError: an objective is unknown, or a setting is wrong.
    """
    settings = settings or ForgettingSettings()
    check_counts(seeds=settings.seeds, rl_steps=settings.rl_steps, steps=settings.steps, batch_size=settings.batch_size)
    base = base_config(config, start=settings.start)
    rl = {seed: _rl(base, seed, settings) for seed in range(settings.seeds)}
    after = {
        (name, seed): _after(base, name, trial, seed, settings)
        for seed, trial in rl.items()
        for name in settings.objectives
    }
    done = run_trials(
        list(after.values()),
        workplace.folder,
        jobs=workplace.jobs,
        threads=workplace.threads,
        stop=workplace.stop,
        say=workplace.say,
    )
    runs = tuple(
        ForgettingRun(objective=name, seed=seed, before=found.before.by_problem, after=found.after.by_problem)
        for (name, seed), trial in after.items()
        if (found := done.results.get(trial.name)) is not None
    )
    if done.stopped or not runs:
        return None
    return compare_forgetting(settings, tuple(_rl_runs(rl, done)), runs, done.failures)


def _rl(base: Config, seed: int, settings: ForgettingSettings) -> Trial:
    """RL from the start, after a warm-up where one is asked for; its model stays where a freeze compares with it."""
    warm = None
    if settings.warmup:
        sft = sft_config(base, steps=settings.warmup, batch_size=settings.batch_size, seed=seed)
        compared = bool({FROZEN, MIFO} & set(settings.objectives))
        warm = Trial(name=f"warmup-seed{seed}", config=sft, keep_export=compared)
    return Trial(name=f"rl-first-seed{seed}", config=rl_config(base, steps=settings.rl_steps, seed=seed), after=warm)


def _after(base: Config, name: str, rl: Trial, seed: int, settings: ForgettingSettings) -> Trial:
    """One objective from the RL run's export.

    Raises:
        ConfigError: there is no such objective.
    """
    seed_after, own = seed + OTHER_ORDER, base.method
    mifo = own if isinstance(own, MifoMethod) else MifoMethod()
    command: tuple[str, ...] = TRAIN
    fraction = mifo.token_fraction if name in (SELECTED, MIFO) else 1.0
    if name == RL:
        config = rl_config(base, steps=settings.steps, seed=seed_after)
    elif name in LOSSES or name in (SELECTED, FROZEN, MIFO):
        config = sft_config(
            base,
            steps=settings.steps,
            batch_size=settings.batch_size,
            seed=seed_after,
            loss=LOSSES.get(name, "cross_entropy"),
            token_fraction=fraction,
        )
        if name in (FROZEN, MIFO):
            command = ("mifo.lab.frozen_run", "--top", str(mifo.freeze_top))
    elif name in MIXED:
        config = mixed_config(base, name, steps=settings.steps, batch_size=settings.batch_size, seed=seed_after)
    elif name in recipe_names():
        config = _of_recipe(base, name, settings.steps, seed_after)
    else:
        known = ", ".join([RL, *LOSSES, SELECTED, FROZEN, MIFO, *MIXED])
        raise ConfigError(f"--objectives {name}: unknown. There are {known}, and recipes (mifo recipes).")
    return Trial(name=f"{name}-seed{seed}", config=config, after=rl, command=command)


def _of_recipe(base: Config, name: str, steps: int, seed: int) -> Config:
    """The method and optimizers of a recipe on the model, data and rollouts of the probe's own."""
    _, other = load_config(name)
    if other.stages:
        raise ConfigError(f"--objectives {name}: the recipe is a list of stages. Name one of one method.")
    return replace(
        base,
        method=other.method,
        rl_optimizer=other.rl_optimizer,
        sft_optimizer=other.sft_optimizer,
        train=replace(base.train, steps=steps, seed=seed),
    )


def _rl_runs(rl: Mapping[int, Trial], done: Trials) -> Iterator[RlRun]:
    for seed, trial in rl.items():
        found: TrialResult | None = done.results.get(trial.name)
        if found is not None:
            yield RlRun(
                seed=seed,
                before=found.before.accuracy,
                after=found.after.accuracy,
                rewarded=found.rewarded or 0.0,
                mixed_groups=found.mixed_groups or 0.0,
            )


# --- what they say -------------------------------------------------------------------------------------------------------


def compare_forgetting(
    settings: ForgettingSettings,
    rl: Sequence[RlRun],
    runs: Sequence[ForgettingRun],
    failures: Sequence[TrialFailure] = (),
) -> Forgetting:
    """Rows and claims of some runs."""
    names = [name for name in settings.objectives if any(run.objective == name for run in runs)]
    after = {name: {run.seed: run.after for run in runs if run.objective == name} for name in names}
    before = {name: {run.seed: run.before for run in runs if run.objective == name} for name in names}
    table = {
        name: ForgettingRow(
            objective=name,
            seeds=len(after[name]),
            before=sum(map(_mean, before[name].values())) / len(before[name]),
            after=sum(map(_mean, after[name].values())) / len(after[name]),
            change=paired_difference(after[name], before[name]),
            against_ce=paired_difference(after[name], after[CE]) if CE in after and name != CE else None,
        )
        for name in names
    }
    notes = tuple(_notes(rl))
    return Forgetting(
        settings=settings,
        rl=tuple(rl),
        runs=tuple(runs),
        table=tuple(table.values()),
        claims=tuple(_claims(table, learned=any(run.mixed_groups > 0 for run in rl))),
        notes=notes,
        failures=tuple(failures),
    )


def _notes(rl: Sequence[RlRun]) -> Iterator[str]:
    """RL that had nothing to learn from."""
    idle = [run for run in rl if run.mixed_groups == 0]
    if idle:
        wrong = all(run.rewarded == 0 for run in idle)
        seeds = ", ".join(str(run.seed) for run in idle)
        reason = "no rollout had a reward" if wrong else "the rewards of every group were equal"
        yield (
            f"RL had no signal with seed {seeds}: {reason}, so there was nothing that could be forgotten. Begin with an able "
            "model (--start), or with SFT (--warmup)."
        )


def _claims(table: Mapping[str, ForgettingRow], *, learned: bool) -> Iterator[Claim]:
    """The paper's Table 2; without a reward nothing can be told."""

    def told(text: str, paper: str, side: Side, measured: Estimate | None, bound: float = 0.0) -> Claim:
        undecided = "" if learned else "RL had no signal"
        return Claim(
            text=text, paper=paper, unit="points", side=side, bound=bound, measured=measured, undecided=undecided
        )

    changes = {name: row.change for name, row in table.items()}
    if RL in table:
        yield told("RL that goes on keeps the accuracy", "Table 2: +1.1", "above", changes[RL], -KEPT)
    if CE in table:  # of other losses the paper says nothing
        yield told(f"{CE} after RL loses accuracy", "Table 2, RL→SFT: −15.6", "below", changes[CE])
    for name in [name for name in table if name in MIXED]:
        yield told(f"{name} after RL loses accuracy", f"Table 2: {MIXED[name]}", "below", changes[name])
    if MIFO in table:
        yield told("MIFO's SFT keeps the accuracy", "Table 2: +0.9", "above", changes[MIFO], -KEPT)
        paper = "Table 2: +0.9 against −15.6"
        yield told("MIFO's SFT loses less than cross-entropy", paper, "above", table[MIFO].against_ce)


def _mean(by_problem: Mapping[str, float]) -> float:
    return sum(by_problem.values()) / len(by_problem)
