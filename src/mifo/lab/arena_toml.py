"""A configuration as a TOML file that `mifo train` reads back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mifo.config.decode import encode
from mifo.config.schema import Config


def config_toml(config: Config, description: str) -> str:
    """Every setting of a configuration, defaults included, so that a later version's defaults change nothing."""
    plain = encode(config)
    tagged = {"method": plain["method"]} | {name: table for name, table in plain.items() if name != "method"}
    return f"description = {_value(description)}\n" + "".join(_tables(name, part) for name, part in tagged.items())


def _tables(name: str, part: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> str:
    """One table, or one for each stage."""
    if isinstance(part, Mapping):
        return _table(name, f"[{name}]", part)
    return "".join(_table(name, f"[[{name}]]", table) for table in part)


def _table(name: str, header: str, table: Mapping[str, Any]) -> str:
    inner = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    lines = [f"{key} = {_value(value)}" for key, value in table.items() if key not in inner]
    below = (_table(f"{name}.{key}", f"[{name}.{key}]", part) for key, part in inner.items())
    return "\n".join(["", header, *lines, ""]) + "".join(below)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    return repr(value)
