"""Arena files: what is read, and what is refused by name."""

from pathlib import Path

import pytest

from mifo.errors import ConfigError
from mifo.lab.arena_file import read_arena

EXAMPLE = Path(__file__).parents[3] / "arenas" / "embedded.toml"
SMALL = """
seeds = 2
[budget]
flops = 1e9
[methods.mifo]
recipe = "tiny"
[methods.soft]
recipe = "tiny"
settings = { method = { freeze_top = 0.1 } }
"""


def write(tmp_path, text):
    path = tmp_path / "arena.toml"
    path.write_text(text)
    return path


def test_the_shipped_arena():
    arena = read_arena(EXAMPLE)
    names = [c.name for c in arena.contestants]
    assert names == [
        "mifo", "mifo-dagger", "int", "es", "pf", "sft", "grpo", "sft_rl", "relift", "luffy", "srft", "hpt", "chord",
    ]  # fmt: skip
    assert arena.seeds == (0, 1, 2)
    assert arena.reference == "mifo"
    assert arena.settings.budget.kind == "flops"


def test_a_small_arena(tmp_path):
    arena = read_arena(write(tmp_path, SMALL))
    assert (arena.name, arena.seeds, arena.reference) == ("arena", (0, 1), "mifo")
    assert arena.contestants[1].settings == {"method": {"freeze_top": 0.1}}
    assert (arena.settings.budget.kind, arena.settings.budget.amount) == ("flops", 1e9)


def test_a_recipe_beside_the_arena(tmp_path):
    (tmp_path / "mine.toml").write_text('extends = "tiny"\n[method]\nfreeze_top = 0.25\n')
    arena = read_arena(write(tmp_path, '[budget]\nsteps = 4\n[methods.mine]\nrecipe = "mine.toml"\n'))
    assert arena.contestants[0].tables["method"]["freeze_top"] == 0.25


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("flops = 1e9", ""), "nothing is set"),
        (("flops = 1e9", "flops = 1e9\nsteps = 3"), "flops and steps are set"),
        (("flops = 1e9", "flops = -1"), "budget.flops = -1"),
        (("flops = 1e9", "flop = 1"), "Did you mean 'flops'"),
        (("seeds = 2", "seeds = 0"), "seeds = 0"),
        (("seeds = 2", 'reference = "grpo"'), "reference = 'grpo' is no method"),
        (('[methods.mifo]\nrecipe = "tiny"', '[methods.mifo]\nrecipe = "tinny"'), "Did you mean 'tiny'"),
        (('[methods.mifo]\nrecipe = "tiny"', "[methods.mifo]\nseed = 1"), "methods.mifo needs recipe"),
        (
            ('[methods.mifo]\nrecipe = "tiny"', '[methods.mifo]\nrecipe = "tiny"\nsteps = 1'),
            "methods.mifo.steps is not",
        ),
        (("[methods.mifo]", '[methods."a/b"]'), "part of file names"),
        (("[budget]", "[tuning]\none_rate = [1.0]\n[budget]"), "unequal effort"),
        (("[budget]", "[tuning]\none_rate = [1.0]\ntwo_rates = [[1.0]]\n[budget]"), "holds pairs"),
        (("[budget]", "[tuning]\none_rate = [0.0]\ntwo_rates = [[1.0, 1.0]]\n[budget]"), "must be above 0"),
        (("[budget]", "[tuning]\nseed = 1\n[budget]"), "tuning.seed = 1 is also"),
        (("[budget]", '[tuning]\nvalidation = "embedded:test"\n[budget]'), "is also what the final runs"),
        (("[budget]", '[tuning]\nvalidation = "embedded"\n[budget]'), "is also what the final runs"),  # its test split
        (
            ("[budget]", '[tuning]\nvalidation = "./t.jsonl"\n[test]\nin_distribution = "t.jsonl"\n[budget]'),
            "is also what the final runs",
        ),
        (
            (
                "[budget]",
                '[tuning]\nvalidation = "./embedded.jsonl"\n[test]\nin_distribution = "embedded.jsonl"\n[budget]',
            ),
            "is also what the final runs",
        ),
        (("[budget]", '[tuning]\nvalidation = "none"\n[budget]'), "rates are selected on it"),
        (("[budget]", '[test]\nin_distribution = "none"\n[budget]'), "ranked by it"),
        (("seeds = 2", "seeds = 2\nmethod = 1"), "method is not a setting"),
        (("seeds = 2", "seeds = 2\nsettings = 3"), "settings holds tables of settings"),
        (
            ('[methods.mifo]\nrecipe = "tiny"', '[methods.mifo]\nrecipe = "tiny"\nsettings = 3'),
            "mifo.settings holds tables",
        ),
        (
            ("[budget]", '[settings.data]\nevaluation = "x.jsonl"\n[budget]'),
            "settings.data.evaluation would have no effect",
        ),
        (("[budget]", "[settings.train]\nseed = 3\n[budget]"), "settings.train.seed would have no effect"),
        (("[budget]", '[settings.run]\nname = "a"\n[budget]'), "settings.run would have no effect"),
        (("[methods.mifo]", "[methods.tuning-mifo]"), "begin with tuning-"),
    ],
)
def test_mistakes_are_named(tmp_path, change, words):
    with pytest.raises(ConfigError) as caught:
        read_arena(write(tmp_path, SMALL.replace(*change)))
    assert words in str(caught.value)


def test_no_methods_and_no_file(tmp_path):
    with pytest.raises(ConfigError, match="names no methods"):
        read_arena(write(tmp_path, "[budget]\nsteps = 1\n"))
    with pytest.raises(ConfigError, match="is no arena file"):
        read_arena(tmp_path / "other.toml")
