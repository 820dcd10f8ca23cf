"""Payloads as data (problem, demonstration, id, source, answer, column): dry run, training, evaluation, messages."""

import json
import re

import pytest
from attack import (
    FORMS,
    NAMES,
    PAYLOADS,
    RIGHT,
    ScriptedEngine,
    as_read,
    filled,
    payload_texts,
    watching,
    without_style,
)

from mifo.cli import main
from mifo.commands import SHOWN_CHARACTERS
from mifo.printable import printable
from mifo.types import Verdict

CATEGORIES = list(dict.fromkeys(p["category"] for p in PAYLOADS))
HALVES = [name for name, p in zip(NAMES, PAYLOADS, strict=True) if p["text"] != as_read(p["text"])]  # surrogates


def of_category(texts, category):
    return [text for text, p in zip(texts, PAYLOADS, strict=True) if p["category"] == category]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="ascii")
    return str(path)


def flags(model, train, evaluation="none"):
    common = [
        "--model.path",
        model,
        "--model.compute",
        "float32",
        "--data.train",
        train,
        "--data.evaluation",
        evaluation,
    ]
    limits = ["--data.max-prompt-tokens", "12000", "--rollout.max-response-tokens", "4000"]
    return [*common, *limits, "--data.families", "--data.levels", "none", "--data.no-verify-demonstrations"]


def words(text):
    """Without white space, which a terminal's lines and tabs change."""
    return "".join(text.split())


@pytest.fixture
def colours(monkeypatch):
    """A terminal that shows colours, as rich sees it."""
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "4000")  # so that no cell of a table is wrapped


@pytest.mark.parametrize("category", [c for c in CATEGORIES if c != "surrogates"])
def test_a_dry_run_shows_payloads_as_they_are_and_never_raw(
    category, byte_folder, tmp_path, monkeypatch, capsys, colours
):
    texts = of_category(payload_texts(tmp_path / "canary"), category)
    row = {"problem": "\n".join(texts), "answer": RIGHT, "source": texts[0], "id": texts[-1]}
    row["demonstration"] = "".join(texts)[: SHOWN_CHARACTERS - 20] + f" \\boxed{{{RIGHT}}}"
    data = write_rows(tmp_path / "data.jsonl", [row])
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    longest = ["--data.max-demonstration-tokens", "8000"]
    assert main(["train", "grpo-smollm2", *flags(byte_folder, data), *longest, "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    problem = shown.out.partition("a prompt as the model sees it")[2].rpartition("Expected for")[0]
    assert "\x1b" in problem  # the rules between are coloured,
    texts_shown = [line for line in problem.split("\n") if "─" not in line][:-1]
    assert "\x1b" not in "\n".join(texts_shown)  # and what is between them is not
    for text in texts:
        assert words(printable(text)) in words(problem)
    if category == "tokens":
        assert "1 without their demonstration, which holds an end token inside" in shown.out
    else:
        assert words(printable(row["demonstration"])) in words(problem)
    plain = without_style(shown.out)
    assert printable(plain) == plain
    assert not (tmp_path / "canary").exists()
    assert not list((tmp_path / "cwd").iterdir())


@pytest.fixture
def rows(tmp_path):
    """A problem for every payload, which is its text, demonstration, id and source."""
    return [
        {
            "id": f"{text}#{i}",
            "problem": f"{text} Number {i}?",
            "answer": RIGHT,
            "demonstration": f"{text} \\boxed{{{RIGHT}}}",
            "source": f"{i}:{text}",
        }
        for i, text in enumerate(payload_texts(tmp_path / "canary"))
    ]


def test_the_table_of_an_evaluation(byte_folder, rows, tmp_path, monkeypatch, capsys, colours):
    data = write_rows(tmp_path / "own.jsonl", rows)
    monkeypatch.setattr("mifo.commands.build_engine", lambda *_: ScriptedEngine([f"\\boxed{{{RIGHT}}}", "\x1b[31mred"]))
    arguments = ["--data", data, "--max-tokens", "40", "--json", str(tmp_path / "figures.json")]
    with watching() as deeds:
        assert main(["eval", byte_folder, *arguments]) == 0
    shown = capsys.readouterr()
    plain = without_style(shown.out)
    assert printable(plain) == plain
    assert f"bad UTF-8 {len(HALVES)}" in plain
    sources = [row["source"] for row in rows if row["source"] == as_read(row["source"])]
    for source in sources:
        assert all(words(line) in words(plain) for line in printable(source).split("\n")), source
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert sorted(figures["by_source"]) == sorted(sources)
    assert deeds.connections == []
    assert not (tmp_path / "canary").exists()


def test_the_same_style_for_every_source(byte_folder, rows, tmp_path, monkeypatch, capsys, colours):
    """Markup in a source colours nothing: its row has the styles that any row has."""
    monkeypatch.setattr("mifo.commands.build_engine", lambda *_: ScriptedEngine([f"\\boxed{{{RIGHT}}}"]))
    styles = []
    for source in ("plain", *(p["text"] for p in PAYLOADS if p["category"] == "markup")):
        data = write_rows(tmp_path / "own.jsonl", [rows[0] | {"source": source}])
        assert main(["eval", byte_folder, "--data", data, "--max-tokens", "40"]) == 0
        table = capsys.readouterr().out.partition("problems from")[2]
        styles.append(re.findall(r"\x1b\[[0-9;]*m", table))
    assert styles[0]
    assert all(found == styles[0] for found in styles)


def test_training_on_payloads(byte_folder, rows, tmp_path, monkeypatch, capsys):
    """SFT on every row but those with half a surrogate pair in them."""
    recipe = tmp_path / "data.toml"
    recipe.write_text(
        '[method]\nname = "sft"\nbatch_size = 90\n[train]\nsteps = 3\nthreads = 1\n[run]\nexport = false\n'
    )
    monkeypatch.chdir(tmp_path)
    data = write_rows(tmp_path / "train.jsonl", rows)
    held_out = write_rows(
        tmp_path / "held_out.jsonl", [row | {"problem": "Other: " + row["problem"]} for row in rows[:40]]
    )
    monkeypatch.setattr("mifo.train.build.build_engine", lambda *_: ScriptedEngine(["\x1b[31mred", "[bold]"]))
    assert main(["train", str(recipe), *flags(byte_folder, data, held_out)]) == 0
    shown = capsys.readouterr()
    assert printable(shown.out + shown.err) == shown.out + shown.err
    summary = json.loads((tmp_path / "runs/data/summary.json").read_text())
    assert summary["unique_demonstrations"] > 200
    assert len(summary["by_source_after"]) == 40
    for path in (tmp_path / "runs/data").glob("*.jsonl"):
        for line in path.read_bytes().split(b"\n")[:-1]:
            json.loads(line)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data.toml", "held_out.jsonl", "runs", "train.jsonl"]


@pytest.mark.parametrize("category", CATEGORIES)
def test_messages_about_data_are_printable(category, tmp_path, capsys, monkeypatch):
    """Where data is wrong, its own text stands in the message: here the names of its columns."""
    monkeypatch.chdir(tmp_path)
    texts = of_category(payload_texts(tmp_path / "canary"), category)
    data = write_rows(tmp_path / "data.jsonl", [dict.fromkeys(texts, "1")])
    assert main(["train", "tiny", "--data.train", data, "--data.families", "--data.levels", "none"]) == 2
    message = capsys.readouterr().err
    assert "no known schema" in message
    assert printable(message) == message
    assert all(printable(text) in message for text in texts)
    assert [p.name for p in tmp_path.iterdir()] == ["data.jsonl"]


def test_a_grader_that_fails_shows_responses_printable(byte_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"problem": f"Number {i}?", "answer": "x+1", "grader": "math"} for i in range(8)]
    data = write_rows(tmp_path / "train.jsonl", rows)
    script = [filled(FORMS[1], f"\\frac{{{p['text']}") for p in PAYLOADS if p["category"] in ("ansi", "unicode")]
    monkeypatch.setattr("mifo.train.build.build_engine", lambda *_: ScriptedEngine([*script, ""]))
    monkeypatch.setattr("mifo.rewards.grade.Grader.grade", lambda _, answers: [Verdict.ERROR] * len(answers))
    failing = ["--reward.max-failure-share", "0.1", "--reward.failure-window", "20"]
    assert main(["train", "grpo-smollm2", *flags(byte_folder, data), *failing]) == 2
    message = capsys.readouterr().err
    assert "response ends" in message
    assert printable(message) == message
