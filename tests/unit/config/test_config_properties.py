"""Any configuration survives the way to plain data, JSON and back; any plain data is decoded or refused by name."""

import dataclasses
import json
import math
import types
import typing
from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mifo.config.bounds import Bounds
from mifo.config.check import check_config
from mifo.config.decode import check_bounds, decode, encode
from mifo.config.schema import Config
from mifo.config.stages import merge
from mifo.errors import ConfigError


def values_of(hint, bounds=Bounds()):  # noqa: B008
    """Values of a field's type, within its bounds."""
    origin = typing.get_origin(hint)
    if origin is Annotated:
        plain, *extras = typing.get_args(hint)
        bounds = next((e for e in extras if isinstance(e, Bounds)), Bounds())
        return values_of(plain, bounds)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*map(values_of, typing.get_args(hint)))
    if origin is Literal:
        return st.sampled_from(typing.get_args(hint))
    if origin is tuple:
        return st.lists(values_of(typing.get_args(hint)[0]), max_size=3).map(tuple)
    if dataclasses.is_dataclass(hint):
        return tables_of(hint)
    if hint is type(None):
        return st.none()
    if hint is str:  # "none" is how no value is written
        return st.text(max_size=20).filter(lambda text: text != "none" and "\0" not in text)
    if hint is int:
        low, high = (
            limit if math.isfinite(limit) else end for limit, end in ((bounds.low, -(2**63)), (bounds.high, 2**63 - 1))
        )
        return st.integers(math.ceil(low), math.floor(high)).filter(bounds.contains)
    if hint is float:
        low, high = (limit if math.isfinite(limit) else None for limit in (bounds.low, bounds.high))
        return st.floats(low, high, allow_nan=False, allow_infinity=False).filter(bounds.contains)
    return {bool: st.booleans()}[hint]


def tables_of(table):
    hints = typing.get_type_hints(table, include_extras=True)
    return st.builds(table, **{f.name: values_of(hints[f.name]) for f in dataclasses.fields(table)})


@settings(max_examples=60, deadline=None)
@given(tables_of(Config))
def test_decode_of_encode_is_the_same_configuration(config):
    check_bounds(config)
    stored = json.loads(json.dumps(encode(config)))  # as config.json of a run holds it
    again = decode(Config, stored)
    assert again == config
    assert json.loads(json.dumps(encode(again))) == stored


PLAIN = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=8), inner, max_size=3)),
    max_leaves=8,
)
TABLES = [f.name for f in dataclasses.fields(Config) if f.name != "stages"]
SETTINGS = {name: [f.name for f in dataclasses.fields(getattr(Config(), name))] for name in TABLES}
PATHS = [(table, name) for table, names in SETTINGS.items() for name in names]


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(PATHS), PLAIN)
def test_any_value_in_any_place_is_decoded_or_refused(path, value):
    table, name = path
    try:
        config = decode(Config, {table: {name: value}})
        check_config(config)
    except ConfigError:
        return
    assert decode(Config, encode(config)) == config


TREES = st.recursive(
    st.integers(0, 9), lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3), max_leaves=12
).filter(lambda tree: isinstance(tree, dict))


@given(TREES, TREES, TREES)
def test_merging_is_associative_and_the_later_wins(first, second, third):
    assert merge({}, second) == second == merge(second, {})
    assert merge(first, first) == first
    assert set(merge(first, second)) == set(first) | set(second)
    if not clashes(first, second) and not clashes(second, third) and not clashes(first, third):
        assert merge(merge(first, second), third) == merge(first, merge(second, third))


def clashes(one, other):
    """A table in one where the other has a number: which of three then stands depends on the order of merging."""
    shared = [(one[key], other[key]) for key in one.keys() & other.keys()]
    return any(isinstance(a, dict) != isinstance(b, dict) or (isinstance(a, dict) and clashes(a, b)) for a, b in shared)


def test_every_setting_is_reached():
    assert len(PATHS) > 60
    with pytest.raises(KeyError):
        values_of(bytes)
