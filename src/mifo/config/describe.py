"""The schema as text: for `mifo methods` and the configuration reference."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union

from mifo.config import schema
from mifo.config.bounds import Bounds


def method_descriptions() -> list[tuple[str, str]]:
    """(name, one line) of every method, in the order of the union."""
    members = typing.get_args(schema.MethodConfig)
    return [(_name(member), (member.__doc__ or "").strip().splitlines()[0]) for member in members]


def _name(member: type) -> str:
    return str(next(f.default for f in dataclasses.fields(member) if f.name == "name"))


def field_comments(cls: type) -> dict[str, str]:
    """The string under each field of a dataclass, as its description; of fields that it inherits, from where they stand."""
    comments: dict[str, str] = {}
    for base in cls.__bases__:
        if dataclasses.is_dataclass(base):
            comments |= field_comments(base)
    body = ast.parse(inspect.getsource(cls)).body[0]
    assert isinstance(body, ast.ClassDef)
    for statement, after in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
        ):
            assert isinstance(statement.target, ast.Name)
            comments[statement.target.id] = inspect.cleandoc(str(after.value.value))
    return comments


def type_text(hint: Any) -> str:
    """A type as a reader would write its values."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        return f"{type_text(typing.get_args(hint)[0])}, {bounds_text(hint)}"
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(hint))
    if origin is tuple:
        return f"list of {type_text(typing.get_args(hint)[0])}"
    if tags := tagged_tables(hint):
        return f"table with `name` = {' or '.join(f'`{tag}`' for tag in tags)}, or none"
    if origin is Union or type(hint).__name__ == "UnionType":
        return " or ".join("none" if part is type(None) else type_text(part) for part in typing.get_args(hint))
    if dataclasses.is_dataclass(hint):
        return "table"
    return {int: "whole number", float: "number", str: "text", bool: "true or false"}[hint]


def tagged_tables(hint: Any) -> list[str]:
    """The names that tell apart the tables of an optional union; [] where it is something else."""
    members = [part for part in typing.get_args(hint) if part is not type(None)]
    return [_name(part) for part in members] if len(members) > 1 and all(map(dataclasses.is_dataclass, members)) else []


def bounds_text(hint: Any) -> str:
    """The range written beside a type, or ""."""
    if typing.get_origin(hint) is Annotated:
        return str(next(extra for extra in typing.get_args(hint)[1:] if isinstance(extra, Bounds)))
    return next((text for part in typing.get_args(hint) if (text := bounds_text(part))), "")


def value_text(value: Any) -> str:
    """A value as TOML writes it, texts without their quotes."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return f"[{', '.join(value)}]" if isinstance(value, tuple) else str(value)


def _default(f: dataclasses.Field[Any]) -> str:
    return value_text(f.default)


def reference_rows(cls: type, prefix: str) -> Iterator[tuple[str, str, str, str]]:
    """(setting, type, default, meaning) of every field below a table, nested tables included."""
    hints = typing.get_type_hints(cls, include_extras=True)
    comments = field_comments(cls)
    for f in dataclasses.fields(cls):
        path = f"{prefix}.{f.name}"
        if dataclasses.is_dataclass(hints[f.name]):
            yield from reference_rows(typing.cast(type, hints[f.name]), path)
        else:
            yield path, type_text(hints[f.name]), _default(f), comments[f.name]


def reference_page() -> str:
    """docs/configuration.md: every setting of every table, from the schema itself."""
    lines = ["# Configuration reference", "", "Generated from the schema by `python -m mifo.config.describe`.", ""]
    for f in dataclasses.fields(schema.Config):
        hint = typing.get_type_hints(schema.Config)[f.name]
        if typing.get_origin(hint) is tuple:
            lines += _stage_section(f.name, typing.get_args(hint)[0])
            continue
        members = typing.get_args(hint) or (hint,)
        for member in members:
            tag = f' with `name = "{_name(member)}"`' if len(members) > 1 else ""
            lines += [f"## [{f.name}]{tag}", "", inspect.cleandoc(member.__doc__ or ""), ""]
            lines += ["| setting | values | default | meaning |", "| --- | --- | --- | --- |"]
            lines += [
                f"| `{path}` | {kind} | `{default}` | {_cell(text)} |"
                for path, kind, default, text in reference_rows(member, f.name)
            ]
            lines.append("")
    return "\n".join(lines)


def _stage_section(name: str, cls: type) -> list[str]:
    """The settings of a list of tables; tables within them are described where they stand for the whole run."""
    hints, comments = typing.get_type_hints(cls, include_extras=True), field_comments(cls)
    lines = [f"## [[{name}]]", "", inspect.cleandoc(cls.__doc__ or ""), ""]
    lines += ["| setting | values | default | meaning |", "| --- | --- | --- | --- |"]
    for f in dataclasses.fields(cls):
        plain = f.default is not dataclasses.MISSING
        inherited = "train.steps" if f.name == "steps" else value_text(f.default)
        kind, default = (type_text(hints[f.name]), inherited) if plain else ("table", f"[{f.name}]")
        lines.append(f"| `{name}.{f.name}` | {kind} | `{default}` | {_cell(comments[f.name])} |")
    return [*lines, ""]


def _cell(text: str) -> str:
    """Text of a Markdown table's cell: a bar would end it."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(reference_page(), end="")
