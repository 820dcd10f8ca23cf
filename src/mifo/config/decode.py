"""Plain data (from TOML) to configuration dataclasses and back, with errors that say what to write instead."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar, Union

from mifo.config.bounds import Bounds
from mifo.errors import ConfigError

T = TypeVar("T")
LONGEST_SHOWN = 200  # characters of a value in a message


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls, include_extras=True)


def closest(word: str, known: list[str]) -> str:
    """A suggestion for a misspelt name, ready to stand at the end of a message."""
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"Did you mean '{match[0]}'?" if match else f"Known here: {', '.join(sorted(known))}."


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def decode(cls: type[T], data: Mapping[str, Any], where: str = "") -> T:
    """Build a configuration dataclass from nested plain data.

    Args:
        cls: the dataclass.
        data: a table; missing keys take their defaults.
        where: dotted path of this table, for messages.

    Raises:
        ConfigError: unknown key, wrong type, value outside its range; names the key and the remedy.
    """
    prefix = f"{where}." if where else ""
    hints = _hints(cls)
    for key in data:
        if key not in hints:
            raise ConfigError(f"{prefix}{key} is not a setting. {closest(key, list(hints))}")
    values = {key: _value(hints[key], value, f"{prefix}{key}") for key, value in data.items()}
    return cls(**values)


def _value(hint: Any, value: Any, where: str) -> Any:
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return _value(typing.get_args(hint)[0], value, where)
    if origin in (Union, types.UnionType):
        return _union(typing.get_args(hint), value, where)
    if origin is Literal:
        choices = typing.get_args(hint)
        if value not in choices or isinstance(value, bool) != isinstance(choices[0], bool):
            raise ConfigError(f"{where} = {_shown(value)} is not one of {', '.join(map(repr, choices))}.")
        return value
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} = {_shown(value)} must be a table of settings.")
        return decode(typing.cast(type, hint), value, where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} = {_shown(value)} must be a list.")
        kind = typing.get_args(hint)[0]
        tables = dataclasses.is_dataclass(kind)
        return tuple(_value(kind, item, numbered(where, i) if tables else where) for i, item in enumerate(value))
    return _scalar(hint, value, where)


def _scalar(hint: type, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise ConfigError(
            f"{where} = {_shown(value)} must be {_NAMES[hint]}, not {_NAMES.get(type(value), type(value).__name__)}."
        )
    if isinstance(value, str) and "\0" in value:
        raise ConfigError(f"{where} = {_shown(value)} holds a NUL, which no name of a file can. Take it out.")
    return value


def numbered(where: str, index: int) -> str:
    """The name of a table of a list in messages, counted from 1: stages[1]."""
    return f"{where}[{index + 1}]"


_NAMES: dict[type, str] = {
    int: "a whole number", float: "a number", str: "a text in quotes", bool: "true or false", list: "a list", dict: "a table",
}  # fmt: skip


def _union(options: tuple[Any, ...], value: Any, where: str) -> Any:
    if type(None) in options and (value is None or value == "none"):  # TOML has no null; "none" stands for it
        return None
    members = [option for option in options if option is not type(None)]
    if len(members) == 1:
        return _value(members[0], value, where)
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} = {_shown(value)} must be a table with a name.")
    tags = {_tag(member): member for member in members}
    name = value.get("name")
    if not isinstance(name, str) or name not in tags:
        raise ConfigError(f"{where}.name = {_shown(name)} is not known. {closest(str(name), list(tags))}")
    return decode(tags[name], value, where)


def _tag(member: type) -> str:
    return str(next(f.default for f in dataclasses.fields(member) if f.name == "name"))


def check_bounds(config: Any, where: str = "") -> None:
    """Refuse numbers outside the range written beside their type, wherever they came from.

    Raises:
        ConfigError: names the field, the value and the range.
    """
    for name, hint in _hints(type(config)).items():
        value = getattr(config, name)
        path = f"{where}.{name}" if where else name
        if dataclasses.is_dataclass(value):
            check_bounds(value, path)
            continue
        if isinstance(value, tuple):
            for index, item in enumerate(value):
                if dataclasses.is_dataclass(item):
                    check_bounds(item, numbered(path, index))
            continue
        if isinstance(value, int) and value.bit_length() > 63:
            raise ConfigError(f"{path} is an integer of over 64 bits. Write a smaller one.")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{path} = {value!r} must be a finite number.")
        for bounds in _bounds(hint):
            if value is not None and not bounds.contains(value):
                raise ConfigError(f"{path} = {value!r} must be {bounds}.")


def _bounds(hint: Any) -> list[Bounds]:
    if typing.get_origin(hint) is Annotated:
        return [extra for extra in typing.get_args(hint)[1:] if isinstance(extra, Bounds)]
    return [bounds for option in typing.get_args(hint) for bounds in _bounds(option)]


def encode(config: Any) -> dict[str, Any]:
    """The configuration as plain data that `decode` reads back (None as "none")."""
    plain: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            plain[f.name] = encode(value)
        elif value is None:
            plain[f.name] = "none"
        elif isinstance(value, tuple):
            plain[f.name] = [encode(item) if dataclasses.is_dataclass(item) else item for item in value]
        else:
            plain[f.name] = value
    return plain
