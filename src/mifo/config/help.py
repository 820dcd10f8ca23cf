"""`mifo train --help`: every setting as a flag, with the value it has in a recipe. Plain text, in a terminal's width."""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from mifo.config import schema
from mifo.config.describe import bounds_text, field_comments, tagged_tables, value_text

INDENT = " " * 8
TAGS = ("method.name", "method.scorer.name")  # never flags


def settings_help(config: schema.Config, *, width: int, all_methods: bool) -> str:
    """The settings of a configuration, section by section.

    Args:
        config: its values are shown as the defaults.
        width: columns of the terminal.
        all_methods: also show the settings that only methods other than the configuration's have.
    """
    lines: list[str] = []
    for f in dataclasses.fields(config):
        if f.name == "legacy":  # never a flag
            continue
        table = getattr(config, f.name)
        if isinstance(table, tuple):  # of stages: no flags
            continue
        lines += _section(f.name, table, width, f" (method {table.name})" if f.name == "method" else "")
    if all_methods:
        shown = {path for path, *_ in _rows(config.method, "method")}
        for member in typing.get_args(schema.MethodConfig):
            lines += _section("method", member(), width, f" (method {member().name}, what it has besides)", shown)
            shown |= {path for path, *_ in _rows(member(), "method")}
    return "\n".join(lines)


def _section(name: str, table: Any, width: int, remark: str, hidden: typing.Collection[str] = ()) -> list[str]:
    rows = [row for row in _rows(table, name) if row[0] not in hidden]
    if not rows:
        return []
    summary = inspect.cleandoc(type(table).__doc__ or "").splitlines()[0]
    lines = ["", *textwrap.wrap(f"{name}{remark}: {summary}", width)]
    for path, hint, value, comment in rows:
        lines.append(f"  {_flag(path, hint)}")
        lines += textwrap.wrap(
            f"{comment} {_default(hint, value)}", width, initial_indent=INDENT, subsequent_indent=INDENT
        )
    return lines


def _rows(table: Any, prefix: str) -> Iterator[tuple[str, Any, Any, str]]:
    """(path, type, value, comment) of the settings that can be given as flags."""
    hints = typing.get_type_hints(type(table), include_extras=True)
    comments = field_comments(type(table))
    for f in dataclasses.fields(table):
        value, path = getattr(table, f.name), f"{prefix}.{f.name}"
        if dataclasses.is_dataclass(value):
            yield from _rows(value, path)
        elif path not in TAGS and not tagged_tables(hints[f.name]):  # a table that is not there has no flags
            yield path, hints[f.name], value, comments[f.name]


def _flag(path: str, hint: Any) -> str:
    name = path.replace("_", "-")
    if hint is bool:
        table, _, setting = name.rpartition(".")
        return f"--{name} | --{table}.no-{setting}"
    return f"--{name} {_kind(hint)}"


def _kind(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return _kind(typing.get_args(hint)[0])
    if origin is Literal:
        return "{" + ",".join(map(str, typing.get_args(hint))) + "}"
    if origin is tuple:
        return f"{_kind(typing.get_args(hint)[0])} ..."
    if origin is not None:  # a union with None
        return "|".join("none" if part is type(None) else _kind(part) for part in typing.get_args(hint))
    return {int: "INTEGER", float: "NUMBER", str: "TEXT"}[hint]


def _default(hint: Any, value: Any) -> str:
    limits = bounds_text(hint)
    return f"(default: {value_text(value)}{f'; {limits}' if limits else ''})"
