"""Plain data to configuration and back: what is refused, and with which words."""

import datetime

import pytest

from mifo.config.bounds import Bounds
from mifo.config.decode import check_bounds, decode, encode
from mifo.config.load import read_recipe, recipe_names
from mifo.config.schema import Config, GrpoMethod, MifoMethod, SftMethod
from mifo.errors import ConfigError


def refused(tables):
    with pytest.raises(ConfigError) as caught:
        check_bounds(decode(Config, tables))
    return str(caught.value)


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"modle": {}}, ["modle is not a setting", "Did you mean 'model'?"]),
        ({"method": {"name": "mifo", "freeze_tpo": 0.3}}, ["method.freeze_tpo", "Did you mean 'freeze_top'?"]),
        ({"method": {"name": "mifo", "rl": {"clip_hihg": 0.3}}}, ["method.rl.clip_hihg", "'clip_high'"]),
        ({"train": {"zzzz": 1}}, ["train.zzzz is not a setting", "Known here: ", "micro_batch_tokens"]),
        ({"train": {"steps": "ten"}}, ["train.steps = 'ten' must be a whole number, not a text in quotes"]),
        ({"train": {"steps": 3.0}}, ["train.steps = 3.0 must be a whole number, not a number"]),
        ({"train": {"steps": True}}, ["train.steps = True must be a whole number, not true or false"]),
        ({"train": {"minutes": True}}, ["train.minutes = True must be a number, not true or false"]),
        ({"run": {"export": 1}}, ["run.export = 1 must be true or false, not a whole number"]),
        ({"model": {"path": 3}}, ["model.path = 3 must be a text in quotes, not a whole number"]),
        ({"model": {"path": datetime.date(2020, 1, 1)}}, ["model.path", "not date"]),
        ({"model": "tiny"}, ["model = 'tiny' must be a table of settings"]),
        ({"data": {"families": "gcd"}}, ["data.families = 'gcd' must be a list"]),
        ({"data": {"families": [1]}}, ["data.families = 1 must be a text in quotes"]),
        ({"model": {"compute": "float16"}}, ["model.compute = 'float16' is not one of 'auto', 'float32', 'bfloat16'"]),
        ({"model": {"compute": ["auto"]}}, ["model.compute = ['auto'] is not one of"]),
        ({"method": "mifo"}, ["method = 'mifo' must be a table with a name"]),
        ({"method": {"name": "miffo"}}, ["method.name = 'miffo' is not known", "Did you mean 'mifo'?"]),
        ({"method": {"freeze_top": 0.1}}, ["method.name = None is not known"]),
        ({"method": {"name": "grpo", "freeze_top": 0.1}}, ["method.freeze_top is not a setting"]),
        ({"method": {"name": "mifo", "freeze_top": 1.5}}, ["method.freeze_top = 1.5 must be at least 0 and at most 1"]),
        ({"method": {"name": "mifo", "history": 1.0}}, ["method.history = 1.0 must be at least 0 and less than 1"]),
        ({"method": {"name": "mifo", "token_fraction": 0.0}}, ["token_fraction = 0.0 must be more than 0"]),
        ({"train": {"steps": 0}}, ["train.steps = 0 must be at least 1"]),
        ({"train": {"seed": 2**32}}, ["train.seed = 4294967296 must be at least 0 and at most 4294967295"]),
        ({"train": {"minutes": 0}}, ["train.minutes = 0.0 must be more than 0"]),
        ({"rl_optimizer": {"learning_rate": float("inf")}}, ["rl_optimizer.learning_rate = inf must be"]),
        ({"rl_optimizer": {"learning_rate": float("nan")}}, ["rl_optimizer.learning_rate = nan must be"]),
        ({"reward": {"incorrect": float("-inf")}}, ["reward.incorrect = -inf must be a finite number"]),
    ],
)
def test_refused_with_field_value_and_remedy(tables, words):
    message = refused(tables)
    for word in words:
        assert word in message


def test_whole_numbers_stand_for_numbers_and_none_is_a_word():
    config = decode(Config, {"train": {"minutes": 3}, "model": {"context": "none"}, "data": {"evaluation": "none"}})
    assert config.train.minutes == 3.0
    assert isinstance(config.train.minutes, float)
    assert config.model.context is None
    assert config.data.evaluation == "none"  # a text field keeps the word


def test_method_is_chosen_by_name():
    assert isinstance(decode(Config, {}).method, MifoMethod)
    assert isinstance(decode(Config, {"method": {"name": "grpo"}}).method, GrpoMethod)
    assert isinstance(decode(Config, {"method": {"name": "sft"}}).method, SftMethod)


@pytest.mark.parametrize("name", recipe_names())
def test_encoding_is_read_back(name):
    config = decode(Config, read_recipe(name).tables)
    assert decode(Config, encode(config)) == config
    assert encode(decode(Config, encode(config))) == encode(config)


def test_bounds():
    half_open = Bounds(0.0, 1.0, open_high=True)
    assert half_open.contains(0.0)
    assert not half_open.contains(1.0)
    assert not Bounds(0.0, open_low=True).contains(0.0)
    assert not Bounds().contains(float("inf"))
    assert not Bounds().contains(float("nan"))
    assert Bounds(0).contains(10**400)  # whole numbers have no largest float
    assert str(Bounds(1)) == "at least 1"
    assert str(Bounds()) == "any number"
