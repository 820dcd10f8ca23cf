"""Help, lists and mistakes in settings are answered without torch, and read nothing twice."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from mifo.cli import main
from mifo.config import load
from mifo.config.describe import method_descriptions
from mifo.config.load import recipe_names

# Runs the command line in a fresh interpreter in which heavy libraries cannot be imported.
GUARDED = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "transformers", "numpy", "datasets", "pyarrow", "sympy", "math_verify"}:
            raise AssertionError("imported " + name)

sys.meta_path.insert(0, Refuse())
from mifo.cli import main
sys.exit(main(sys.argv[1:]))
"""


def guarded(*arguments):
    return subprocess.run(
        [sys.executable, "-c", GUARDED, *arguments], capture_output=True, text=True, encoding="utf-8", timeout=60
    )


def test_the_guard_guards():
    script = GUARDED.replace("from mifo.cli import main", "import numpy")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "imported numpy" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ((), 0),
        (("--help",), 0),
        (("--version",), 0),
        (("train", "--help"), 0),
        (("train", "tiny", "--help"), 0),
        (("eval", "--help"), 0),
        (("rejuvenate", "--help"), 0),
        (("probe", "--help"), 0),
        *(
            (("probe", name, "--help"), 0)
            for name in ("magnitude", "overlap", "entropy", "sparsify", "redundancy", "coupling")
        ),
        (("probe",), 2),
        (("compare", "--help"), 0),
        (("recipes",), 0),
        (("methods",), 0),
        (("train",), 2),
        (("train", "nothing"), 2),
        (("train", "tiny", "--method.freeze-top", "2"), 2),
        (("train", "tiny", "--method.freeze-tpo", "0.2"), 2),
    ],
)
def test_no_heavy_imports(arguments, status):
    done = guarded(*arguments)
    assert done.returncode == status, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr if status else done.stdout


def test_help_reads_no_recipe_twice(capsys, monkeypatch):
    """A recipe takes milliseconds to parse, and there are many."""
    read = []
    parse = load.read_toml
    monkeypatch.setattr(load, "read_toml", lambda path: read.append(Path(path).stem) or parse(path))
    shown(capsys, monkeypatch, "train", "--help")
    assert set(recipe_names()) <= set(read)
    assert len(read) == len(set(read))


def shown(capsys, monkeypatch, *arguments):
    monkeypatch.setenv("COLUMNS", "100")
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 100
    return text


def test_train_help_without_a_recipe(capsys, monkeypatch):
    text = shown(capsys, monkeypatch, "train", "--help")
    assert text.startswith(
        "usage: mifo train RECIPE_OR_TOML [--SECTION.SETTING VALUE ...] [--resume [--no-verify]] [--dry-run]\n"
    )
    recipes = text.partition("\nrecipes:\n")[2].partition("\nsettings")[0]
    assert [name for name in recipe_names() if f"  {name} " in recipes] == recipe_names()
    assert "--dry-run   read the data" in text
    assert "--method.freeze-top NUMBER" in text
    assert "--method.batch-size INTEGER" in text  # of another method
    assert "None" not in text  # a reader writes none


def test_train_help_of_a_recipe(capsys, monkeypatch):
    text = shown(capsys, monkeypatch, "train", "mifo-dagger", "--help")
    assert "settings, with the values of mifo-dagger:" in text
    history = " ".join(text.partition("--method.history NUMBER\n")[2].partition("  --")[0].split())
    assert history.endswith("(default: 0; at least 0 and less than 1)")
    assert "--method.batch-size" not in text
    assert text == shown(capsys, monkeypatch, "train", "--help", "mifo-dagger")


def test_help_and_no_command(capsys, monkeypatch):
    text = shown(capsys, monkeypatch)
    assert text.startswith("usage: mifo ")
    for verb in ("train", "eval", "compare", "probe", "rejuvenate", "recipes", "methods"):
        assert re.search(rf"^    {verb}\s", text, re.MULTILINE)


def test_recipes(capsys, monkeypatch):
    text = shown(capsys, monkeypatch, "recipes")
    assert [line.split()[0] for line in text.splitlines() if line[:1] != " "] == recipe_names()
    assert "MIFO on the embedded SmolLM2-135M-Instruct" in text


def test_methods(capsys, monkeypatch):
    lines = shown(capsys, monkeypatch, "methods").splitlines()
    assert [line.split()[0] for line in lines if line[:1] != " "] == [name for name, _ in method_descriptions()]
    assert "parameter freezing" in lines[0]
