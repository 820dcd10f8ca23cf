"""A real arena on `tiny`: stopped, killed, resumed, with a run that fails; then its table again from its folders."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from mifo.cli import main

ARENA = """
description = "two methods on a toy"
seeds = 2
[budget]
flops = 1.2e9
tolerance = 0.5
[tuning]
one_rate = [1.0]
two_rates = [[1.0, 3.0]]
budget_share = 0.5
validation_problems = 13
[test]
out_of_distribution = "none"
[settings.data]
evaluation_problems = 7
[settings.method]
buffer_size = 30
[settings.evaluation]
every_flops = 5e8
[methods.mifo]
recipe = "tiny"
[methods.free]
recipe = "tiny"
settings = { method = { freeze_top = 0.0 } }
"""


def start(arena, folder, log):
    """`mifo compare` as a process of its own, in a session that takes signals."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "mifo.cli", "compare", str(arena), "--folder", str(folder), "--jobs", "2"],
            stdout=output, stderr=output, start_new_session=True, env=os.environ | {"COLUMNS": "200"},
        )  # fmt: skip


def wait_for(condition, process, log, seconds=240.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def runs_with(folder, name):
    return {path.parent.name for path in (folder / "runs").glob(f"*/{name}")}


@pytest.fixture(scope="module")
def arena(tmp_path_factory):
    """An arena stopped in its grid by SIGINT, then killed among its final runs, then run to its end: (folder, log, status)."""
    place = tmp_path_factory.mktemp("arena")
    file, folder, log = place / "toy.toml", place / "toy", place / "log"
    file.write_text(ARENA)
    first = start(file, folder, log)
    wait_for(lambda: runs_with(folder, "metrics.jsonl"), first, log)
    first.send_signal(signal.SIGINT)
    assert first.wait(120) == 3, log.read_text()
    assert "Continue with the same command" in log.read_text()
    assert runs_with(folder, "checkpoints/*/MANIFEST.json") or runs_with(folder, "summary.json")
    assert not runs_with(folder, "measured.json")

    second = start(file, folder, log)
    wait_for(lambda: any(name.endswith("-seed0") for name in runs_with(folder, "metrics.jsonl")), second, log)
    second.kill()
    second.wait(60)
    third = start(file, folder, log)
    return file, folder, log, third.wait(600)


def test_it_comes_to_its_end(arena):
    _, folder, log, status = arena
    text = log.read_text()
    assert status == 0, text
    assert runs_with(folder, "measured.json") == {f"{m}-seed{s}" for m in ("mifo", "free") for s in (0, 1)}
    assert "learning rate" in text
    assert not list(folder.glob("runs/*/checkpoints"))
    assert not list(folder.glob("runs/*/export"))


def test_nothing_was_done_twice(arena):
    """Every run began once from its start: one evaluation before training, resumed where it was broken off."""
    _, folder, _, _ = arena
    for path in folder.glob("runs/*/events.jsonl"):
        events = [json.loads(line) for line in path.read_text().splitlines()]
        labels = [event["label"] for event in events if event["event"] == "evaluation"]
        assert labels.count("before") == labels.count("after") == 1, path
    tuned = json.loads((folder / "comparison.json").read_text())["methods"][0]["learning_rates"]
    assert [trial["factors"] for trial in tuned["trials"]] == [[1.0, 3.0]]
    assert tuned["rates"] == pytest.approx([3e-4, 3e-3])


def test_its_files(arena):
    _, folder, _, _ = arena
    runs = list(csv.DictReader((folder / "runs.csv").open()))
    assert sorted((row["method"], row["seed"]) for row in runs) == [(m, s) for m in ("free", "mifo") for s in "01"]
    for row in runs:
        assert row["status"] == "within budget"
        assert 1.2e9 <= float(row["flops"]) < 1.8e9
        assert 0 < float(row["relative_movement"]) < 10
        assert 0 < int(row["unique_problems"]) <= 80
    record = json.loads((folder / "comparison.json").read_text())
    curve = record["methods"][0]["runs"][0]["curve"]
    assert len(curve) >= 3
    assert [point["flops"] for point in curve] == sorted(point["flops"] for point in curve)
    text = (folder / "table.txt").read_text()
    assert "less mifo" in text
    assert "2 seeds say little" in text


def test_a_finished_arena_only_writes_its_table_again(arena, capsys):
    file, folder, _, _ = arena
    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*")}
    started = time.monotonic()
    assert main(["compare", str(file), "--folder", str(folder)]) == 0
    assert time.monotonic() - started < 60  # training would take minutes on a busy machine
    assert "4 of 4 runs are finished already" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/*")}


def test_the_same_table_from_its_folders(arena, tmp_path, capsys):
    _, folder, _, _ = arena
    assert (
        main(
            ["compare", "--report", str(folder), "--reference", "mifo", "--tolerance", "0.5", "--folder", str(tmp_path)]
        )
        == 0
    )
    shown = capsys.readouterr().out
    assert "No budget was set" in shown
    mine, theirs = (
        {row["method"]: row for row in csv.DictReader((place / "methods.csv").open())} for place in (tmp_path, folder)
    )
    for method in ("mifo", "free"):
        for column in ("accuracy", "accuracy_low", "accuracy_high", "accuracy_difference", "flops", "movement"):
            assert mine[method][column] == theirs[method][column]


def test_without_matplotlib_everything_but_the_figures_is_there(arena, tmp_path, capsys, monkeypatch):
    _, folder, _, _ = arena
    monkeypatch.setattr("mifo.compare_commands.have_matplotlib", lambda: False)
    assert main(["compare", "--report", str(folder), "--folder", str(tmp_path)]) == 0
    assert "pip install matplotlib" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"methods.csv", "runs.csv", "comparison.json", "table.txt"}


def test_another_arena_in_its_folder_is_refused(arena, tmp_path, capsys):
    file, folder, _, _ = arena
    changed = tmp_path / "toy.toml"
    changed.write_text(file.read_text().replace("buffer_size = 30", "buffer_size = 31"))
    assert main(["compare", str(changed), "--folder", str(folder)]) == 2
    assert re.search(r"was run with method.buffer_size = 30, and the arena now says 31", capsys.readouterr().err)
    assert main(["compare", str(file), "--flops", "2e9", "--folder", str(folder)]) == 2
    assert "train.max_flops" in capsys.readouterr().err


def test_a_second_arena_on_the_folder_is_refused(arena, capsys):
    from mifo.train.lock import FolderLock

    file, folder, _, _ = arena
    with FolderLock(folder):
        assert main(["compare", str(file), "--folder", str(folder)]) == 2
    message = capsys.readouterr().err
    assert "is in use by process" in message
    assert "choose another --folder" in message


def test_a_failed_run_is_reported_and_stops_no_other(tmp_path, capsys):
    """One of two methods cannot read its buffer full: the other's runs finish, the report and the status say so."""
    file = tmp_path / "broken.toml"
    file.write_text(
        ARENA.replace("buffer_size = 30", "buffer_size = 30\n").replace("freeze_top = 0.0", "buffer_size = 90")
    )
    status = main(["compare", str(file), "--folder", str(tmp_path / "out"), "--seeds", "1", "--no-tune"])
    shown = capsys.readouterr().out
    assert status == 2, shown
    assert "failed: free-seed0 (final): data.train = 'embedded'" in shown
    assert "mifo-seed0: " in shown
    assert "free has no finished run" in shown
    assert "not tuned (--no-tune)" in shown
    runs = {row["run"]: row["status"] for row in csv.DictReader((tmp_path / "out" / "runs.csv").open())}
    assert runs["mifo-seed0"] == "within budget"
    assert runs["free-seed0"].startswith("failed: ")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "needs an arena file"),
        (["--recipe", "tiny"], "needs an arena file"),
        (["nothing.toml"], "is no arena file"),
        (["--recipe", "tiny", "--methods", "mifo", "--flops", "1", "--steps", "2"], "a budget is one of them"),
        (["--recipe", "tiny", "--methods", "mifo", "--steps", "8", "--jobs", "-1"], "--jobs -1"),
        (["x.toml", "--recipe", "tiny"], "--recipe has no effect with an arena file"),
        (["--recipe", "tiny", "--methods", ","], "--methods names none"),
        (["--report", "a", "--jobs", "2"], "--jobs has no effect with --report"),
        (["--report", "/nowhere"], "neither a run folder nor the folder of an arena"),
    ],
)
def test_mistakes(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *arguments]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert "Traceback" not in message
