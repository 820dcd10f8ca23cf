"""`[[stages]]` of a recipe: what a stage leaves out is as in the tables of the whole run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mifo.config.decode import closest, encode, numbered
from mifo.config.schema import REJUVENATE, Config, StageConfig
from mifo.config.scored import OWNERS
from mifo.errors import ConfigError

INHERITED = ("method", "rl_optimizer", "sft_optimizer")
TRAINED = (*INHERITED, "steps")  # what a stage that only rejuvenates has not
OF_THE_WHOLE_RUN = tuple(f.name for f in dataclasses.fields(Config) if f.name not in (*INHERITED, "stages"))


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, table by table; a table that changes its `name` tag replaces the inherited one."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        mergeable = isinstance(old, Mapping) and isinstance(value, Mapping)
        same_tag = mergeable and value.get("name", old.get("name")) == old.get("name")  # type: ignore[union-attr]
        result[key] = merge(old, value) if same_tag and isinstance(old, Mapping) else value
    return result


def without_owner(tables: Mapping[str, Any], keep: Mapping[str, Any]) -> dict[str, Any]:
    """The tables without the inherited one of a second model that no method has any more; those in `keep` were written beside."""
    stages = tables.get("stages")
    parts = [tables, *(stages if isinstance(stages, list) else ())]
    methods = [_table_of(part, "method") for part in parts]
    kinds = {table.get("name") for method in methods for table in (method, _table_of(method, "scorer"))}
    return {name: table for name, table in tables.items() if name in keep or OWNERS.get(name) in {None, *kinds}}


def _table_of(part: object, name: str) -> Mapping[str, Any]:
    """A table within another; {} where there is none, or something else that is refused later."""
    found = part.get(name) if isinstance(part, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def with_stages(tables: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of a recipe with every stage written out: its own tables on top of the run's, `steps` as train.steps.

    Raises:
        ConfigError: a stage is no table, or has a table that holds for the whole run.
    """
    stages = tables.get("stages", [])
    if not isinstance(stages, list) or not all(isinstance(stage, Mapping) for stage in stages):
        raise ConfigError("stages must be a list of tables: write [[stages]] above the settings of each stage.")
    inherited = {name: tables[name] for name in INHERITED if name in tables}
    train = tables.get("train")
    if isinstance(train, Mapping) and "steps" in train:
        inherited["steps"] = train["steps"]
    written = []
    for index, stage in enumerate(stages):
        _check_keys(stage, numbered("stages", index))
        written.append(stage if _rejuvenates(stage) else merge(inherited, stage))
    return {**tables, "stages": written}


def _rejuvenates(stage: Mapping[str, Any]) -> bool:
    return bool(stage.get(REJUVENATE, "none") != "none")


def _check_keys(stage: Mapping[str, Any], where: str) -> None:
    known = [f.name for f in dataclasses.fields(StageConfig)]
    written_out = encode(StageConfig())  # as a configuration that was written to a file has them
    for key in stage:
        if key in OF_THE_WHOLE_RUN:
            raise ConfigError(
                f"{where}.{key} cannot differ by stage: a stage has {', '.join(known)}; model, data, rewards, rollouts and the "
                f"others hold for the whole run. Write [{key}] at the top of the file, or start another run from the export "
                "of the first."
            )
        if key not in known:
            raise ConfigError(f"{where}.{key} is not a setting of a stage. {closest(key, known)}")
        if key in TRAINED and _rejuvenates(stage) and stage[key] != written_out[key]:
            raise ConfigError(
                f"{where}.{key} has no effect with {where}.{REJUVENATE}: such a stage trains nothing. Write what comes after it "
                "as a stage of its own."
            )


def refuse_stage_flags(config: Config, flags: Sequence[str]) -> None:
    """Flags that would change what every stage has of its own.

    Raises:
        ConfigError: one of them is given, and the run has stages.
    """
    if not config.stages:
        return
    for flag in flags:
        name = flag.split("=")[0].replace("_", "-")
        if name == "--train.steps" or name.startswith(("--method.", "--rl-optimizer.", "--sft-optimizer.")):
            raise ConfigError(
                f"{name} is not a flag of a run with stages: each of its {len(config.stages)} stages has a setting of that name. "
                "Write the stages into a TOML file that extends this one."
            )
