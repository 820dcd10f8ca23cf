"""What the probes that train make of their arguments."""

import argparse
from dataclasses import replace

import pytest

from mifo.cli import main
from mifo.config.load import load_config
from mifo.training_probe_commands import _warmup


@pytest.mark.parametrize(
    ("recipe", "given", "start", "steps"),
    [
        ("smollm2-arithmetic", None, None, 24),  # solves nothing as it ships, so RL would have no reward
        ("mini", None, None, 80),
        ("tiny", None, None, 0),
        ("mini", None, "a-model", 0),  # a model that was named is begun with as it is
        ("mini", 0, None, 0),
        ("mini", 7, "a-model", 7),
    ],
)
def test_models_that_solve_nothing_are_made_able_before_rl(recipe, given, start, steps):
    _, config = load_config(recipe)
    assert _warmup(argparse.Namespace(warmup=given), start, config) == steps
    own = replace(config, model=replace(config.model, path="/models/own"))
    assert _warmup(argparse.Namespace(warmup=given), start, own) == (given or 0)


def test_a_warm_up_may_be_none_and_not_less(capsys):
    assert main(["probe", "forgetting", "--recipe", "tiny", "--warmup", "-1"]) == 2
    assert "--warmup -1: at least 0 is needed" in capsys.readouterr().err
