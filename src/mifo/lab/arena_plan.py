"""From an arena to the runs it consists of: one configuration each, all alike but for the method.

Fair or not is decided here: runs of an arena begin from the same model, see the same data, are graded and measured alike and
share their seeds. What differs beyond the method is refused by name unless the arena allows it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

from mifo.config.check import check_config
from mifo.config.decode import decode, encode, numbered
from mifo.config.schema import Config, StageConfig
from mifo.config.stages import merge, with_stages
from mifo.errors import ConfigError
from mifo.lab.arena_file import Arena, BudgetConfig, Contestant
from mifo.methods import make_method
from mifo.train.folder import MAY_CHANGE_ON_RESUME

FAIR_TABLES = ("model", "data", "reward", "rollout", "legacy", "evaluation")
OUT_OF_REACH = 1000  # times the recipe's steps: where FLOPs, tokens or minutes end a run, its steps must not
Stage = Literal["tuning", "final"]
Rated = TypeVar("Rated", Config, StageConfig)
Part = TypeVar("Part")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A method of the arena with the configuration that its final runs share, but for seed and learning rates."""

    name: str
    recipe: Config
    """As it is without the arena's budget."""
    config: Config
    optimizers: tuple[str, ...]
    tuned_stages: Literal["all", "last"] = "all"
    scorers: frozenset[str] = frozenset()
    """Second models of the stages whose rates are tuned."""
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One run: its folder's name and its whole configuration."""

    name: str
    entry: str
    stage: Stage
    seed: int
    config: Config

    @property
    def rates(self) -> tuple[float, float]:
        """Learning rates of the RL and the SFT optimizer; of a list of stages those of the last."""
        return rates_of(self.config)


def rates_of(config: Config) -> tuple[float, float]:
    """Learning rates of the RL and the SFT optimizer; of a list of stages those of the last."""
    last = config.by_stage[-1]
    return last.rl_optimizer.learning_rate, last.sft_optimizer.learning_rate


def make_entries(arena: Arena, folder: str) -> list[Entry]:
    """The methods of an arena, checked one by one and against each other.

    Args:
        arena: what was asked for.
        folder: parent of the run folders.

    Raises:
        ConfigError: a configuration is wrong, or two differ in what a fair comparison shares; names the field.
    """
    entries = [_entry(arena, contestant, folder) for contestant in arena.contestants]
    check_fair({entry.name: entry.config for entry in entries}, arena.settings.allow_different)
    return entries


def _entry(arena: Arena, contestant: Contestant, folder: str) -> Entry:
    tables = merge(merge(contestant.tables, arena.shared), contestant.settings)
    recipe, settings = _decoded(tables, contestant.name), arena.settings
    recipe = replace(
        recipe,
        data=replace(recipe.data, evaluation=settings.test.in_distribution),
        run=replace(recipe.run, folder=folder, name=None, export=True, keep_checkpoints=1, keep_every=None),
    )
    config = _budgeted(recipe, contestant.name, settings.budget)
    _checked(config, contestant.name)
    tuned = settings.tuning.stages
    methods = [make_method(stage) for stage in _tuned(config.by_stage, tuned)]
    used = {name for method in methods for name in method.optimizers}
    return Entry(
        name=contestant.name,
        recipe=recipe,
        config=config,
        optimizers=tuple(name for name in ("rl", "sft") if name in used),
        tuned_stages=tuned,
        scorers=frozenset(method.scorer for method in methods if method.scorer is not None),
        note=contestant.note,
    )


def _tuned(stages: Sequence[Part], which: Literal["all", "last"]) -> Sequence[Part]:
    return stages if which == "all" else stages[-1:]


def _decoded(tables: Mapping[str, Any], name: str) -> Config:
    try:
        return decode(Config, with_stages(tables))
    except ConfigError as error:
        raise ConfigError(f"methods.{name}: {error}") from error


def _checked(config: Config, name: str) -> None:
    try:
        check_config(config)
    except ConfigError as error:
        raise ConfigError(f"methods.{name}: {error}") from error


def _budgeted(config: Config, name: str, budget: BudgetConfig, share: float = 1.0) -> Config:
    try:
        return with_budget(config, budget, share)
    except ConfigError as error:
        raise ConfigError(f"methods.{name}: {error}") from error


def with_budget(config: Config, budget: BudgetConfig, share: float = 1.0) -> Config:
    """The configuration of a run that may spend `share` of a budget, from a recipe's.

    In a list of stages all but the last keep their steps, and the last has what they leave.

    Raises:
        ConfigError: a budget in steps leaves the last stage none.
    """
    train = replace(config.train, minutes=None, max_flops=None, max_tokens=None)
    if budget.steps is not None:
        return _with_steps(replace(config, train=train), max(1, round(share * budget.steps)))
    if budget.flops is not None:
        train = replace(train, max_flops=share * budget.flops)
    elif budget.tokens is not None:
        train = replace(train, max_tokens=max(1, math.ceil(share * budget.tokens)))
    else:
        assert budget.minutes is not None
        train = replace(train, minutes=share * budget.minutes)
    last = config.by_stage[-1].train.steps
    return _with_steps(replace(config, train=train), config.steps + (OUT_OF_REACH - 1) * last)


def _with_steps(config: Config, steps: int) -> Config:
    """So many steps in all; of a list of stages the last has those that the others leave."""
    if not config.stages:
        return replace(config, train=replace(config.train, steps=steps))
    before = config.steps - config.by_stage[-1].train.steps
    if steps <= before:
        raise ConfigError(
            f"the budget of {steps} steps leaves nothing for the last of its stages: those before it take {before}. Give them "
            "fewer steps (settings.stages), or raise the budget."
        )
    return replace(config, stages=(*config.stages[:-1], replace(config.stages[-1], steps=steps - before)))


def final_run(entry: Entry, seed: int, factors: tuple[float, float] = (1.0, 1.0)) -> PlannedRun:
    """A run that is ranked."""
    name = f"{entry.name}-seed{seed}"
    return _run(entry, "final", name, seed, factors, entry.config)


def tuning_runs(arena: Arena, entry: Entry) -> list[tuple[tuple[float, float], PlannedRun]]:
    """The runs of an entry's grid with their factors of the RL and the SFT rate; measured on validation problems alone."""
    tuning = arena.settings.tuning
    config = _budgeted(entry.recipe, entry.name, arena.settings.budget, tuning.budget_share)
    data = replace(config.data, evaluation=tuning.validation)
    if tuning.validation_problems is not None:
        data = replace(data, evaluation_problems=tuning.validation_problems)
    config = replace(
        config,
        data=data,
        evaluation=replace(
            config.evaluation, every_steps=None, every_flops=None, around_sft=False, meter_problems=None
        ),
        run=replace(config.run, export=False, samples_per_step=0),
    )
    return [
        (factors, _run(entry, "tuning", f"tuning-{entry.name}-{i}", tuning.seed, factors, config))
        for i, factors in enumerate(grid(arena, entry))
    ]


def grid(arena: Arena, entry: Entry) -> list[tuple[float, float]]:
    """Factors of the RL and the SFT rate that an entry is tried with; 1 for an optimizer that it does not have."""
    tuning = arena.settings.tuning
    if set(entry.optimizers) == {"rl", "sft"}:
        return [(pair[0], pair[1]) for pair in tuning.two_rates]
    rl = "rl" in entry.optimizers
    return [(factor if rl else 1.0, 1.0 if rl else factor) for factor in tuning.one_rate]


def _run(entry: Entry, stage: Stage, name: str, seed: int, factors: tuple[float, float], config: Config) -> PlannedRun:
    tuned = _tuned([s for s in config.stages if s.rejuvenate is None], entry.tuned_stages)
    config = replace(
        _with_rates(config, factors),
        **_second_model_rates(entry, config, factors[0]),
        stages=tuple(_with_rates(s, factors) if any(s is one for one in tuned) else s for s in config.stages),
        train=replace(config.train, seed=seed),
        run=replace(config.run, name=name),
    )
    _checked(config, entry.name)
    return PlannedRun(name=name, entry=entry.name, stage=stage, seed=seed, config=config)


def _second_model_rates(entry: Entry, config: Config, factor: float) -> dict[str, Any]:
    """The optimizer table of a critic or reward model with the factor of the RL rate, of whose RL it is a part."""
    found = {}
    for scorer, table in (("critic", "critic_optimizer"), ("prm", "prm_optimizer")):
        if scorer in entry.scorers:
            optimizer = getattr(config, table)
            found[table] = replace(optimizer, learning_rate=optimizer.learning_rate * factor)
    return found


def _with_rates(settings: Rated, factors: tuple[float, float]) -> Rated:
    rl, sft = settings.rl_optimizer, settings.sft_optimizer
    return replace(
        settings,
        rl_optimizer=replace(rl, learning_rate=rl.learning_rate * factors[0]),
        sft_optimizer=replace(sft, learning_rate=sft.learning_rate * factors[1]),
    )


# --- fairness ----------------------------------------------------------------------------------------------------------


def flat(plain: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Nested tables as {"table.setting": value}, those of a list as {"tables[1].setting": value}."""
    found: dict[str, Any] = {}
    for key, value in plain.items():
        place = f"{where}.{key}" if where else key
        if isinstance(value, Mapping):
            found |= flat(value, place)
        elif isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
            for index, part in enumerate(value):
                found |= flat(part, numbered(place, index))
        else:
            found[place] = value
    return found


def changed_setting(old: Config, new: Config) -> tuple[str, Any, Any] | None:
    """The first setting with both values in which two configurations are not of the same run; None where they are.

    What decides where a run lives and how it is graded or computed may differ, how long it is may not.
    """
    free = tuple(place for place in MAY_CHANGE_ON_RESUME if place == "train.threads" or not place.startswith("train."))
    before, after = flat(encode(old)), flat(encode(new))
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key) and not key.startswith(free):
            return key, before.get(key), after.get(key)
    return None


def differing(configs: Mapping[str, Config], tables: Sequence[str] = FAIR_TABLES) -> dict[str, dict[str, Any]]:
    """Settings of these tables that are not the same everywhere: {setting: {name: value}}."""
    rows = {name: flat({table: encode(getattr(config, table)) for table in tables}) for name, config in configs.items()}
    keys = sorted({key for row in rows.values() for key in row})
    values = {key: {name: row.get(key) for name, row in rows.items()} for key in keys}
    return {
        key: by_name
        for key, by_name in values.items()
        if any(v != next(iter(by_name.values())) for v in by_name.values())
    }


def check_fair(configs: Mapping[str, Config], allowed: Sequence[str]) -> list[str]:
    """Refuse methods that differ in model, data, grading, sampling or evaluation.

    Args:
        configs: by the name of the method.
        allowed: settings, or whole tables, in which they may differ.

    Returns:
        A note on each difference that was allowed.

    Raises:
        ConfigError: names the setting and both values; or what is allowed is no setting.
    """
    known = flat({table: encode(getattr(config, table)) for config in configs.values() for table in FAIR_TABLES})
    for place in allowed:
        if not any(key == place or key.startswith(f"{place}.") for key in known):
            raise ConfigError(
                f"allow_different names '{place}', which is neither one of the tables {', '.join(FAIR_TABLES)} nor a setting of "
                "them, such as rollout.temperature."
            )
    notes = []
    for key, values in differing(configs).items():
        first, value = next(iter(values.items()))
        other, another = next((name, v) for name, v in values.items() if v != value)
        said = f"{key} = {value!r} for {first} and {another!r} for {other}"
        if not any(key == place or key.startswith(f"{place}.") for place in allowed):
            raise ConfigError(
                f"{said}: the comparison would measure this difference too. Give all methods the same, or add '{key}' to "
                "allow_different."
            )
        notes.append(f"allowed to differ: {said}")
    return notes
