"""From a recipe's name or a TOML file, plus flags, to a checked configuration.

Order, later wins: defaults of the schema, the files named by `extends` (from the outermost in), the file itself, flags.
A table whose `name` changes (another method) replaces the inherited one instead of merging with it. `extends` names a
shipped recipe or a file in the same folder as, or below, the one that names it; nothing else is ever read.
"""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from mifo.config.check import check_config
from mifo.config.decode import closest, decode
from mifo.config.schema import Config
from mifo.config.stages import merge, refuse_stage_flags, with_stages, without_owner
from mifo.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_CONFIG_BYTES = (
    1 << 16
)  # the parser takes 1.5 s over the worst of that size, and four times as long over twice as much
MAX_DEPTH = 8  # tables within tables; the schema has three
MAX_EXTENDS = 16  # files, one extending the other


@dataclass(frozen=True)
class Recipe:
    """A named, described set of settings."""

    name: str
    description: str
    tables: dict[str, Any]
    source: str = ""
    """What the user wrote to get it: a recipe's name or a path."""


def recipe_names() -> list[str]:
    """Names of the shipped recipes, in alphabetical order."""
    folder = resources.files("mifo.recipes")
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".toml"))


def read_recipe(name_or_path: str) -> Recipe:
    """Read a recipe with everything it extends; nothing is checked against the schema yet.

    Raises:
        ConfigError: no such recipe or file, bad TOML, a file over 64 KiB, a circle or a long chain of `extends`.
    """
    return _read(name_or_path, None, ())


def recipe_descriptions() -> list[tuple[str, str]]:
    """Shipped recipes with their descriptions, in alphabetical order; reads what they extend only where they have none."""
    folder = Path(str(resources.files("mifo.recipes")))
    own = {name: read_toml(folder / f"{name}.toml").get("description") for name in recipe_names()}
    return [(name, text or read_recipe(name).description) for name, text in own.items()]


def recipe_chain(name: str) -> list[str]:
    """The names of a shipped recipe and of those it extends, itself first."""
    names = [name]
    while (base := read_toml(_locate(names[-1], None)).get("extends")) is not None:
        names.append(base)
    return names


def _read(reference: str, parent: Path | None, seen: tuple[str, ...]) -> Recipe:
    path = _locate(reference, parent)
    place = str(path.resolve())
    if place in seen:
        raise ConfigError(f"extends runs in a circle: {' -> '.join((*seen, place))}. Remove one of them.")
    if len(seen) >= MAX_EXTENDS:
        raise ConfigError(f"{path}: extends runs through more than {MAX_EXTENDS} files. Merge some of them.")
    data = read_toml(path)
    description = data.pop("description", "")
    if not isinstance(description, str):
        raise ConfigError(f"{path}: description = {description!r} must be a text in quotes.")
    base = data.pop("extends", None)
    if base is None:
        return Recipe(path.stem, description, data, reference)
    if not isinstance(base, str):
        raise ConfigError(f"{path}: extends = {base!r} must be one name or path in quotes.")
    inherited = _read(base, path, (*seen, place))
    tables = without_owner(merge(inherited.tables, data), keep=data)
    return Recipe(path.stem, description or inherited.description, tables, reference)


def _locate(reference: str, parent: Path | None) -> Path:
    shipped = Path(str(resources.files("mifo.recipes"))) / f"{reference}.toml"
    if reference in recipe_names():
        return shipped
    path = Path(reference).expanduser() if parent is None else parent.parent / reference
    if parent is not None and not path.resolve().is_relative_to(parent.parent.resolve()):
        raise ConfigError(
            f"{parent}: extends = {reference!r} leaves the folder of the file. Put the base file beside it."
        )
    if path.suffix == ".toml" and path.is_file():
        return path
    if path.suffix == ".toml":
        raise ConfigError(
            f"{path} does not exist. Give an existing TOML file or a recipe ({', '.join(recipe_names())})."
        )
    raise ConfigError(f"'{reference}' is neither a recipe nor a .toml file. {closest(reference, recipe_names())}")


def read_toml(path: Path) -> dict[str, Any]:
    """A TOML file as plain data.

    Raises:
        ConfigError: it cannot be read, is no TOML, is over 64 KiB, or nests too deeply.
    """
    size = path.stat().st_size
    if size > MAX_CONFIG_BYTES:
        raise ConfigError(
            f"{path} has {size:,} bytes; a configuration has at most {MAX_CONFIG_BYTES:,}. Name the TOML file of a run."
        )
    try:
        data = tomllib.loads(path.read_bytes().decode("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}). Check its permissions.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from error
    except ValueError as error:  # TOMLDecodeError is one; a number of thousands of digits is another
        raise ConfigError(f"{path} is not valid TOML: {error}. Mend that line.") from error
    except RecursionError as error:
        raise _too_deep(path) from error
    _check_plain(path, data)
    return data


def _check_plain(path: Path, data: dict[str, Any]) -> None:
    """Refuse what no message could show: tables within tables without end, and integers beyond TOML's 64 bits."""
    level: list[Any] = [data]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for table in level:
            for key, value in table.items() if isinstance(table, dict) else enumerate(table):
                if isinstance(value, int) and value.bit_length() > 63:
                    raise ConfigError(f"{path}: {key} is an integer of over 64 bits. Write a smaller one.")
                if isinstance(value, dict | list):
                    below.append(value)
        level = below
    if level:
        raise _too_deep(path)


def _too_deep(path: Path) -> ConfigError:
    return ConfigError(f"{path} nests its tables too deeply. Write one table per section.")


def load_config(name_or_path: str, flags: Sequence[str] = ()) -> tuple[Recipe, Config]:
    """The checked configuration of a recipe or file with flags on top.

    Args:
        name_or_path: a shipped recipe's name or the path of a TOML file.
        flags: command-line overrides such as `--method.freeze-top 0.3`.

    Raises:
        ConfigError: anything wrong with it, before anything is loaded.
    """
    recipe = read_recipe(name_or_path)
    config = decode(Config, with_stages(recipe.tables))
    if flags:
        config = _override(config, flags, recipe.name)
    check_config(config)
    return recipe, config


def _override(config: Config, flags: Sequence[str], name: str) -> Config:
    if any(flag.split("=")[0] == "--method.name" for flag in flags):
        raise ConfigError(
            "--method.name is not a flag: another method has other settings. Choose a recipe of that method (mifo recipes), "
            "or write its [method] table into a TOML file that extends this one."
        )
    if any(flag.startswith("--legacy") for flag in flags):
        raise ConfigError(
            "--legacy is not a flag: a defect of a published code holds only in a recipe that names the code. Write a [legacy] "
            'table into a TOML file, or name = "none" into it to leave out that of a recipe which the file extends.'
        )
    refuse_stage_flags(config, flags)
    import tyro  # a quarter of a second that `mifo --help` does not spend

    changed = tyro.cli(
        Config,
        args=_with_none(config, flags),
        default=dataclasses.replace(config, stages=()),
        prog=f"mifo train {name}",
        config=(tyro.conf.AvoidSubcommands,),
    )
    return dataclasses.replace(changed, stages=config.stages)


def _with_none(config: Config, flags: Sequence[str]) -> list[str]:
    """`none`, as TOML writes it, in tyro's spelling, where a setting may be none; of a list it is the empty one."""
    optional, lists = (set(_flags_of(config, "--", kinds)) for kinds in ((typing.Union, types.UnionType), (tuple,)))
    written: list[str] = []
    for flag in flags:
        name, equals, value = flag.partition("=")
        if equals and value == "none" and name.replace("_", "-") in optional:
            written.append(f"{name}=None")
        elif equals and value == "none" and name.replace("_", "-") in lists:
            written.append(name)
        elif flag == "none" and written and written[-1].replace("_", "-") in lists:
            continue
        elif flag == "none" and written and written[-1].replace("_", "-") in optional:
            written.append("None")
        else:
            written.append(flag)
    return written


def _flags_of(config: Any, prefix: str, kinds: Collection[Any]) -> Iterator[str]:
    """Flags whose type is one of these."""
    hints = typing.get_type_hints(type(config), include_extras=True)
    for f in dataclasses.fields(config):
        value, path = getattr(config, f.name), prefix + f.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            yield from _flags_of(value, path + ".", kinds)
        elif typing.get_origin(hints[f.name]) in kinds:
            yield path
