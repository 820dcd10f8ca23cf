"""An arena from a recipe and names of methods: `mifo compare --recipe tiny --methods mifo,relift,sft`.

A name is that of a recipe that extends the given one, or of a method. A method for which no such recipe is shipped is given the
recipe's own tables: its losses, rollouts and batch sizes where it has settings of the same meaning, and the method's
defaults elsewhere. What was carried over is said.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mifo.config import schema
from mifo.config.decode import closest, decode, encode
from mifo.config.load import read_recipe, recipe_chain, recipe_names
from mifo.config.schema import Config, SrftMethod
from mifo.config.stages import merge, without_owner
from mifo.data import tasks
from mifo.errors import ConfigError
from mifo.lab.arena_file import Arena, ArenaSettings, BudgetConfig, Contestant, FinalTest, TuningConfig, check_arena

SAME_MEANING = {"batch_size": ("sft_batch_size", "buffer_size"), "sft_batch_size": ("batch_size", "buffer_size"),
                "buffer_size": ("buffer_size",)}  # fmt: skip
MOST_PROBLEMS = 200
STAGE_SHARE = 4  # a stage takes one step in so many of the recipe's
QUICK_TUNING = TuningConfig(one_rate=(1.0, 3.0), two_rates=((1.0, 1.0), (3.0, 3.0)), budget_share=0.5)


def quick_arena(
    recipe: str, methods: Sequence[str], *, seeds: int, budget: BudgetConfig, tune: bool, reference: str | None
) -> Arena:
    """Methods on the model, data and rollouts of one recipe, with a grid of two points a method at half the budget.

    Args:
        recipe: a shipped recipe, or a TOML file.
        methods: recipes that extend it, or methods.
        seeds: final runs of each method.
        budget: of each run.
        tune: try learning rates first.
        reference: what differences are to; none: the first.

    Raises:
        ConfigError: a name is neither, or does not go with the recipe.
    """
    base = read_recipe(recipe)
    if base.tables.get("stages"):
        raise ConfigError(
            f"--recipe {recipe} is a list of stages, whose methods other methods could be given nothing of. Name the recipe of "
            f"one method that it extends, and {base.name} among the --methods."
        )
    config = decode(Config, base.tables)
    if not methods:
        raise ConfigError("--methods names none. Name some, such as --methods mifo,relift,sft.")
    contestants = tuple(_contestant(name, base.name, recipe, config, base.tables) for name in methods)
    test, shared = _held_out(config)
    settings = ArenaSettings(
        description=f"{', '.join(methods)} with the model, data and rollouts of {base.name}",
        seeds=seeds,
        reference=reference,
        budget=budget,
        tuning=replace(QUICK_TUNING, enabled=tune, validation_problems=_held_out_problems("validation", config)),
        test=test,
    )
    arena = Arena(name=base.name, settings=settings, contestants=contestants, shared=shared)
    check_arena(arena)
    return arena


def _held_out(config: Config) -> tuple[FinalTest, Mapping[str, Any]]:
    """Final problems for a recipe on embedded data, as many as there are up to the recipe's number."""
    data = config.data
    if not data.train.startswith("embedded"):
        raise ConfigError(
            f"data.train = '{data.train}': --recipe takes its validation and test problems from the embedded data. For your own "
            "files write an arena (docs/compare.md) that names both."
        )
    no_ood = config.model.path == "tiny"  # its characters cannot spell those problems
    test = FinalTest(out_of_distribution="none") if no_ood else FinalTest()
    return test, {"data": {"evaluation_problems": _held_out_problems("test", config)}}


def _held_out_problems(split: tasks.Split, config: Config) -> int:
    """The recipe's number, or as many as the split has."""
    wanted = config.data.evaluation_problems or MOST_PROBLEMS
    return min(wanted, tasks.available(split, families=config.data.families or None, max_level=config.data.levels))


def _contestant(name: str, base: str, reference: str, config: Config, tables: Mapping[str, Any]) -> Contestant:
    if name in (base, config.method.name):
        return Contestant(name=name, recipe=reference, tables=tables)
    tags = {_tag(member): member for member in typing.get_args(schema.MethodConfig)}
    shipped = [n for n in recipe_names() if base in recipe_chain(n)]
    if name in shipped:
        return Contestant(name=name, recipe=name, tables=read_recipe(name).tables)
    if name not in tags:
        raise ConfigError(
            f"--methods: '{name}' is neither a method nor a recipe that extends '{base}'. {closest(name, [*tags, *shipped])}"
        )
    own = [n for n in shipped if n.startswith(f"{name.replace('_', '-')}-") and _method_of(n) == name]
    if own:
        best = min(own, key=len)
        return Contestant(name=name, recipe=best, tables=read_recipe(best).tables)
    method, carried = _carried_over(tags[name], config)
    note = f"{name}: settings carried over from {base}: {', '.join(carried)}; defaults elsewhere"
    with_method = without_owner({**tables, "method": encode(method)}, keep={})
    steps = _whole_cycles(method, config.train.steps)
    return Contestant(name=name, recipe=reference, tables=merge(with_method, {"train": {"steps": steps}}), note=note)


def _tag(member: type) -> str:
    return str(next(f.default for f in dataclasses.fields(member) if f.name == "name"))


def _method_of(recipe: str) -> str:
    return str(read_recipe(recipe).tables["method"]["name"])


def _carried_over(member: type, config: Config) -> tuple[Any, list[str]]:
    """The method's settings with those of the recipe's method that mean the same, and the names of these."""
    base, values = config.method, {}
    names = {f.name for f in dataclasses.fields(base)}
    for f in dataclasses.fields(member):
        if f.name in ("rl", "sft", "scorer") and getattr(base, f.name, None) is not None:
            values[f.name] = getattr(base, f.name)
        found = next((s for s in SAME_MEANING.get(f.name, ()) if s in names and getattr(base, s) is not None), None)
        if found is not None:
            values[f.name] = getattr(base, found)
    if member is SrftMethod and "rl" in names:
        for name in ("prompts_per_step", "rollouts_per_prompt", "updates_per_step"):
            values[name] = getattr(base.rl, name)
    fields = {f.name for f in dataclasses.fields(member)}
    if "demonstrations_per_step" in fields and "rl" in names:
        values["demonstrations_per_step"] = base.rl.prompts_per_step
    for name in fields & {"sft_steps", "rl_steps"}:
        values[name] = max(1, config.train.steps // STAGE_SHARE)
    return member(**values), sorted(values)


def _whole_cycles(method: Any, steps: int) -> int:
    """Steps that end with a cycle, for methods whose stages repeat."""
    if isinstance(method, schema.MultiStageMethod):
        cycle = method.sft_steps + method.rl_steps
        return max(1, steps // cycle) * cycle
    return steps
