"""Configuration and data files that are too large, too deep, or not what they say: a clear error or a counted reason."""

import gzip
import json
import subprocess
import sys

import pytest

from mifo.cli import main
from mifo.config.load import MAX_CONFIG_BYTES, MAX_EXTENDS, load_config
from mifo.data import readers
from mifo.data.problems import load_problems
from mifo.errors import ConfigError, DataError
from mifo.printable import printable

GOOD = {"problem": "1+1?", "answer": "2"}


def refused(tmp_path, text):
    path = tmp_path / "own.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    assert len(str(caught.value)) < 1000  # a message, not a copy of the file
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[train]\nsteps = " + "9" * 5000, "is not valid TOML"),
        ("[train]\nsteps = " + "9" * 40, "steps is an integer of over 64 bits"),
        ("[train]\nsteps = 0x" + "f" * 50_000, "steps is an integer of over 64 bits"),
        ("[rl_optimizer]\nlearning_rate = " + "9" * 400, "learning_rate is an integer of over 64 bits"),
        ("[rl_optimizer]\nlearning_rate = 1e400", "learning_rate = inf must be"),
        ("[rl_optimizer]\nlearning_rate = nan", "learning_rate = nan must be"),
        ("a = " + "[" * 300 + "]" * 300, "nests its tables too deeply"),
        ("[" + ".".join("a" * 20_000) + "]", "nests its tables too deeply"),
        ("a" + ".a" * 5000 + " = 1", "nests its tables too deeply"),
        ("[train]\nsteps = 1\n[train]\nsteps = 2", "is not valid TOML"),
        ("[train]\nsteps = 1\nsteps = 1", "is not valid TOML"),
        ("train.steps = 1\n[train]\nminutes = 1", "is not valid TOML"),
        ("[model]\npath = [" + "'x'," * 10_000 + "]", "model.path = ['x', 'x'"),
        ('"' + "k" * 300 + '" = 1', "is not a setting"),
        ("\ufeff[train]\nsteps = 1", "is not valid TOML"),
        (b"[train]\x00\nsteps = 1", "is not valid TOML"),
        ("steps = $(touch canary)", "is not valid TOML"),
        ("include = '/etc/passwd'", "include is not a setting"),
        ("!!python/object/apply:os.system ['touch canary']", "is not valid TOML"),
    ],
)
def test_a_configuration_is_only_data(tmp_path, text, said):
    assert said in refused(tmp_path, text)


def test_a_large_configuration_is_not_read(tmp_path):
    path = tmp_path / "large.toml"
    with path.open("wb") as file:
        file.truncate(8 << 30)  # a hole: it takes no room on the disk, and would take 8 GiB of memory
    with pytest.raises(ConfigError, match=f"at most {MAX_CONFIG_BYTES:,}"):
        load_config(str(path))


def test_what_is_no_file_is_no_configuration(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe.toml")  # reading one would wait for ever
    (tmp_path / "folder.toml").mkdir()
    for name in ("pipe.toml", "folder.toml"):
        with pytest.raises(ConfigError, match="does not exist"):
            load_config(str(tmp_path / name))


def test_a_long_chain_of_extends(tmp_path):
    for i in range(MAX_EXTENDS + 5):
        (tmp_path / f"{i}.toml").write_text(f'extends = "{i + 1}.toml"')
    (tmp_path / f"{MAX_EXTENDS + 5}.toml").write_text('extends = "tiny"')
    with pytest.raises(ConfigError, match=f"more than {MAX_EXTENDS} files"):
        load_config(str(tmp_path / "0.toml"))
    load_config(str(tmp_path / "10.toml"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("--train.steps", "9" * 30), ("--train.steps", "-" + "9" * 30), ("--train.steps", "9" * 5000), ("--train.steps", "1e3"),
        ("--rl-optimizer.learning-rate", "1e400"), ("--rl-optimizer.learning-rate", "nan"),
    ],
)  # fmt: skip
def test_numbers_of_flags(name, value, capsys):
    with pytest.raises((ConfigError, SystemExit)) as caught:
        load_config("tiny", [name, value])
    assert isinstance(caught.value, ConfigError) or caught.value.code == 2


def test_a_description_is_shown_printable(tmp_path, capsys):
    path = tmp_path / "own.toml"
    path.write_text('extends = "tiny"\n[data]\nsystem_prompt = "\\u001b[31mred\\u202e"\n')
    assert main(["train", str(path), "--help"]) == 0
    shown = capsys.readouterr().out
    assert "\\x1b[31mred\\u202e" in shown
    assert printable(shown) == shown


def counts(tmp_path, *lines):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join([json.dumps(GOOD).encode(), *lines]))
    report = load_problems(str(path))
    assert [p.answer for p in report.problems][:1] == ["2"]  # the good row is there whatever stands beside it
    return dict(report.counts)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"[" * 200_000, "bad JSON"),
        (b'{"problem": ' + b"[" * 100_000, "bad JSON"),
        (b'{"problem": "a", "answer": ' + b"9" * 5000 + b"}", "bad JSON"),
        (b'{"problem": "a", "answer": NaN}', "no answer"),
        (b'{"problem": "a", "answer": Infinity}', "no answer"),
        (b'{"problem": "a", "answer": -1e999}', "no answer"),
        (b'{"problem": NaN, "answer": "1"}', "empty prompt"),
        (b'{"problem": "a\x00", "answer": "1"}', "bad JSON"),
        (b"\x00" * 1000, "bad JSON"),
        (b'\xff\xfe{\x00"\x00', "bad UTF-8"),
        (b'{"problem": "\\ud800", "answer": "1"}', "bad UTF-8"),
        (b'{"problem": "a", "answer": "1", "source": "\\udfff"}', "bad UTF-8"),
        (b'{"problem": "a", "answer": "1", "id": "\\ud800"}', "bad UTF-8"),
        (b'{"problem": {"a": 1}, "answer": [[[]]]}', "empty prompt"),
        (b'"text"', "not an object"),
        (b"null", "not an object"),
        (b"{} {}", "bad JSON"),
        (b'{"problem": "a", "answer": "1", "grader": "eval"}', "unknown grader"),
    ],
)
def test_a_bad_line_is_counted(tmp_path, line, reason):
    assert counts(tmp_path, line) == {reason: 1}


def test_deep_values_that_python_can_still_read(tmp_path):
    deep = json.loads("[" * 400 + "]" * 400)
    assert counts(tmp_path, json.dumps({"problem": deep, "answer": "1"}).encode()) == {"empty prompt": 1}


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\n" + json.dumps(GOOD).encode() + b"\r\n\r\n")
    assert load_problems(str(path)).counts == {}


@pytest.mark.parametrize("packed", [False, True])
def test_a_line_over_the_limit_costs_its_row(tmp_path, monkeypatch, packed):
    monkeypatch.setattr(readers, "MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / ("data.jsonl.gz" if packed else "data.jsonl")
    with gzip.open(path, "wb") if packed else path.open("wb") as file:
        for text in ("a", "x" * (5 << 20), "b", "y" * (1 << 20), "c"):
            file.write(json.dumps({"problem": text, "answer": "1"}).encode() + b"\n")
    report = load_problems(str(path))
    assert [p.messages[0].content for p in report.problems] == ["a", "b", "c"]
    assert report.counts == {"line over 1 MiB": 2}


def test_a_json_list_over_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LIST_BYTES", 1 << 16)
    path = tmp_path / "data.json"
    path.write_text(json.dumps([GOOD] * 5000))
    with pytest.raises(DataError, match="a JSON list over 0 MiB; convert it to JSONL"):
        load_problems(str(path))
    path.write_text(json.dumps([GOOD]))
    assert len(load_problems(str(path)).problems) == 1


ONE_GIGABYTE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
from mifo.data.problems import load_problems
report = load_problems(sys.argv[1])
print(len(report.problems), dict(report.counts))
"""


@pytest.mark.slow
def test_a_line_of_a_gigabyte_in_a_gigabyte_of_memory(tmp_path):
    path = tmp_path / "data.jsonl"
    with path.open("wb") as file:
        file.write(json.dumps(GOOD).encode() + b'\n{"problem": "')
        file.seek(1 << 30, 1)  # a hole, read as zeros
        file.write(b'"}\n' + json.dumps({**GOOD, "problem": "2+0?"}).encode() + b"\n")
    done = subprocess.run(
        [sys.executable, "-c", ONE_GIGABYTE, str(path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout.strip() == "2 {'line over 32 MiB': 1}", done.stderr
