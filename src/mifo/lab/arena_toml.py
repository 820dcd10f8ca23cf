"""A configuration as a TOML file that `mifo train` reads back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from mifo.config.decode import encode
from mifo.config.schema import Config


def config_toml(config: Config, description: str) -> str:
    """Every setting of a configuration, defaults included, so that a later version's defaults change nothing."""
    plain = encode(config)
    tagged = {"method": plain["method"]} | {name: table for name, table in plain.items() if name != "method"}
    return f"description = {_value(description)}\n" + "".join(_table(name, table) for name, table in tagged.items())


def _table(name: str, table: Mapping[str, Any]) -> str:
    inner = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    lines = [f"{key} = {_value(value)}" for key, value in table.items() if key not in inner]
    return "\n".join(["", f"[{name}]", *lines, ""]) + "".join(_table(f"{name}.{key}", t) for key, t in inner.items())


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_value, value))}]"
    return repr(value)
