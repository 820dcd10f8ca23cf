"""From a name or a file, with what it extends and flags on top, to a checked configuration."""

import pytest

from mifo.config.load import MAX_CONFIG_BYTES, load_config, read_recipe, recipe_names
from mifo.config.stages import merge
from mifo.errors import ConfigError


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def refused(reference, flags=()):
    with pytest.raises(ConfigError) as caught:
        load_config(reference, flags)
    return str(caught.value)


def test_extends_from_the_outermost_in(tmp_path):
    write(tmp_path, "a.toml", 'description = "A"\n[train]\nsteps = 1\nseed = 1\n[model]\npath = "tiny"')
    write(tmp_path, "b.toml", 'extends = "a.toml"\n[train]\nsteps = 2\nmicro_batch_tokens = 99')
    top = write(tmp_path, "c.toml", 'extends = "b.toml"\n[train]\nmicro_batch_tokens = 100')
    recipe, config = load_config(top, ["--train.steps", "3"])
    assert (config.train.steps, config.train.seed, config.train.micro_batch_tokens) == (3, 1, 100)
    assert config.model.path == "tiny"
    assert (recipe.name, recipe.description, recipe.source) == ("c", "A", top)


def test_a_file_extends_a_shipped_recipe(tmp_path):
    path = write(tmp_path, "own.toml", 'extends = "tiny"\n[method]\nfreeze_top = 0.25')
    _, config = load_config(path)
    _, base = load_config("tiny")
    assert config.method.freeze_top == 0.25
    assert config.method.sft_batch_size == base.method.sft_batch_size == 4


def test_another_method_replaces_the_inherited_table(tmp_path):
    path = write(tmp_path, "own.toml", 'extends = "tiny"\n[method]\nname = "sft"\nbatch_size = 5')
    _, config = load_config(path)  # buffer_size of the mifo table would be an unknown key
    assert config.method.batch_size == 5
    assert config.rollout.max_response_tokens == load_config("tiny")[1].rollout.max_response_tokens


def test_merge():
    assert merge({"a": {"x": 1, "y": {"z": 2}}, "b": 3}, {"a": {"y": {"w": 4}}}) == {
        "a": {"x": 1, "y": {"z": 2, "w": 4}},
        "b": 3,
    }
    assert merge({"m": {"name": "p", "x": 1}}, {"m": {"name": "q", "y": 2}}) == {"m": {"name": "q", "y": 2}}
    assert merge({"m": {"name": "p", "x": 1}}, {"m": {"name": "p", "y": 2}}) == {"m": {"name": "p", "x": 1, "y": 2}}
    base = {"a": {"x": 1}}
    merge(base, {"a": {"x": 2}})
    assert base == {"a": {"x": 1}}  # a recipe that is read twice is not changed by the first reading


def test_a_circle(tmp_path):
    write(tmp_path, "a.toml", 'extends = "b.toml"')
    write(tmp_path, "b.toml", 'extends = "a.toml"')
    assert "extends runs in a circle" in refused(str(tmp_path / "a.toml"))
    (tmp_path / "sub").mkdir()
    write(tmp_path, "c.toml", 'extends = "sub/../c.toml"')  # another spelling of the same file each time around
    assert "extends runs in a circle" in refused(str(tmp_path / "c.toml"))


@pytest.mark.parametrize("base", ["../secret.toml", "/etc/secret.toml"])
def test_extends_does_not_leave_its_folder(tmp_path, base):
    write(tmp_path, "secret.toml", "[train]\nsteps = 1")
    path = write(tmp_path, "inner/a.toml", f'extends = "{base}"')
    message = refused(path)
    assert "leaves the folder" in message
    assert "Put the base file beside it" in message


def test_extends_does_not_follow_a_link_out(tmp_path):
    target = write(tmp_path, "secret.toml", "[train]\nsteps = 1")
    path = write(tmp_path, "inner/a.toml", 'extends = "link.toml"')
    (tmp_path / "inner/link.toml").symlink_to(target)
    assert "leaves the folder" in refused(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"# " + b"x" * MAX_CONFIG_BYTES, ["65,538 bytes", "at most 65,536"]),
        (b"[train]\n# caf\xe9", ["is not UTF-8 text (byte 13)", "Save it as UTF-8"]),
        ("[train\nsteps = 1", ["is not valid TOML", "line 1"]),
        ("[train]\nsteps = 1\nsteps = 2", ["is not valid TOML"]),
        ("a = " + "[" * 50_000, ["nests its tables too deeply"]),
        ("extends = 3", ["extends = 3 must be one name or path in quotes"]),
        ("description = 3", ["description = 3 must be a text in quotes"]),
        ('extends = "tinny"', ["'tinny' is neither a recipe nor a .toml file", "Did you mean 'tiny'?"]),
        ('extends = "base.toml"', ["base.toml does not exist"]),
    ],
)
def test_bad_files(tmp_path, text, words):
    message = refused(write(tmp_path, "a.toml", text))
    for word in words:
        assert word in message


def test_an_unreadable_file(tmp_path, monkeypatch):
    path = write(tmp_path, "a.toml", "")

    def deny(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.read_bytes", deny)
    assert "cannot be read (Permission denied)" in refused(path)


def test_unknown_recipe_and_missing_file():
    message = refused("smollm2-arithmetics")
    assert "is neither a recipe nor a .toml file" in message
    assert "Did you mean 'smollm2-arithmetic'?" in message
    message = refused("nowhere/run.toml")
    assert "nowhere/run.toml does not exist" in message
    assert "smollm2-arithmetic" in message


def test_recipe_names_are_sorted_and_described():
    names = recipe_names()
    assert names == sorted(names)
    assert {"tiny", "smollm2-arithmetic", "mifo-int", "mifo-es", "mifo-pf", "mifo-dagger"} <= set(names)
    for name in names:
        assert len(read_recipe(name).description) > 20


@pytest.mark.parametrize(
    ("flags", "table", "field", "value"),
    [
        (["--method.freeze-top", "0.3"], "method", "freeze_top", 0.3),
        (["--method.freeze_top=0.3"], "method", "freeze_top", 0.3),
        (["--method.freeze-top", "0"], "method", "freeze_top", 0.0),
        (["--rl-optimizer.learning-rate", "1e-5"], "rl_optimizer", "learning_rate", 1e-5),
        (["--run.no-export"], "run", "export", False),
        (["--data.fill-nothing"], None, None, None),
        (["--train.minutes", "2"], "train", "minutes", 2.0),
        (["--data.evaluation", "none"], "data", "evaluation", "none"),
        (["--data.families", "gcd", "product"], "data", "families", ("gcd", "product")),
        (["--run.name", "none-such"], "run", "name", "none-such"),
    ],
)
def test_flags_override(flags, table, field, value, capsys):
    if table is None:
        with pytest.raises(SystemExit) as caught:
            load_config("smollm2-arithmetic", flags)
        assert caught.value.code == 2
        assert "--data.fill-nothing" in capsys.readouterr().err
        return
    _, config = load_config("smollm2-arithmetic", flags)
    assert getattr(getattr(config, table), field) == value


@pytest.mark.parametrize("flags", [["--train.minutes", "none"], ["--train.minutes=none"], ["--train.minutes", "None"]])
def test_none_is_written_as_in_toml(flags):
    assert load_config("smollm2-arithmetic")[1].train.minutes is not None
    assert load_config("smollm2-arithmetic", flags)[1].train.minutes is None


def test_flags_are_checked_too():
    assert "method.freeze_top = 3.0 must be at least 0 and at most 1" in refused("tiny", ["--method.freeze-top", "3"])
    assert "method.buffer_size" in refused("tiny", ["--method.sft-batch-size", "1000"])


def test_the_method_is_no_flag():
    message = refused("tiny", ["--method.name", "grpo"])
    assert "--method.name is not a flag" in message
    assert "[method]" in message
