"""SIGINT and SIGTERM save and end within ten seconds, wherever they strike; a second one ends at once; one run a folder."""

import json
import signal
import threading
import time
from pathlib import Path

import pytest
from kill_harness import Strike, Victims, contents

from mifo.cli import main
from mifo.signals import EXIT_STOPPED
from mifo.train.checkpoint import list_checkpoints
from mifo.train.stop import Stop, Stopped

# Turns that would take far more than ten seconds: where to slow down, the region to strike, and when.
LONG = {
    "generation": ({"generation/decode step": 2.0}, "generation"),
    "rl update": ({"rl update/micro-batch": 3.0}, "rl update"),
    "sft update": ({"sft update/micro-batch": 5.0}, "sft update"),
    "evaluation": ({"evaluation/decode step": 2.0}, "evaluation"),
    "grading": ({"grading": 30.0}, "grading"),
}
SECONDS = 10.0


def command(recipe, folder, *more):
    return ["train", recipe, "--run.folder", folder, "--run.name", "run", *more]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("part", ["rl update", "save", "phase switch"])
def test_stopped_and_resumed_in_the_same_bits(victims: Victims, recipe, whole, tmp_path, number, part):
    strike = Strike(part, 2, 0.01, number)
    life = victims.run(command(recipe, tmp_path), log=tmp_path / "log", strike=strike)
    text = (tmp_path / "log").read_text()
    assert life.status == EXIT_STOPPED[number], text
    assert life.seconds_to_end < SECONDS
    assert f"mifo: {number.name}: saving, then ending" in text
    assert f"continue with: mifo train {recipe} --run.folder {tmp_path} --run.name run --resume" in text
    assert victims.run(command(recipe, tmp_path, "--resume"), log=tmp_path / "log").status == 0
    assert contents(tmp_path / "run") == contents(whole[0])


@pytest.mark.parametrize("part", LONG)
def test_a_long_turn_is_broken_off(victims, recipe, whole, tmp_path, part):
    slow, region = LONG[part]
    number = signal.SIGTERM if part in ("generation", "grading", "sft update") else signal.SIGINT
    folder = tmp_path
    if region == "sft update":  # come to it at full speed, with a checkpoint before it
        early = Strike("sft update", 1, 0.0, signal.SIGKILL)
        assert victims.run(command(recipe, folder), log=folder / "log", strike=early).status == -9
    more = ["--resume"] if region == "sft update" else []
    strike = Strike(region, 1, 0.5, number)
    life = victims.run(command(recipe, folder, *more), log=folder / "log", strike=strike, slow=slow)
    print(f"{part}: ended {life.seconds_to_end:.2f} s after the signal")
    assert life.status == EXIT_STOPPED[number], (folder / "log").read_text()
    assert life.seconds_to_end < SECONDS
    assert victims.run(command(recipe, folder, "--resume"), log=folder / "log").status == 0
    assert contents(folder / "run") == contents(whole[0])


def test_a_second_signal_ends_at_once(victims, recipe, whole, tmp_path):
    strike = Strike("rl update", 2, 0.0, signal.SIGTERM, again=0.5)
    life = victims.run(command(recipe, tmp_path), log=tmp_path / "log", strike=strike, slow={"save": 5.0})
    assert life.status == -signal.SIGTERM
    assert life.seconds_to_end < 2.0
    assert victims.run(command(recipe, tmp_path, "--resume"), log=tmp_path / "log").status == 0
    assert contents(tmp_path / "run") == contents(whole[0])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_two_signals_at_the_same_instant_are_two(victims, recipe, tmp_path, number):
    """The interpreter handles one after the other; the second ends the run as it would a moment later."""
    other = signal.SIGINT if number == signal.SIGTERM else signal.SIGTERM
    strike = Strike("rl update", 2, 0.05, number, together=other)
    life = victims.run(command(recipe, tmp_path), log=tmp_path / "log", strike=strike, slow={"rl update": 2.0})
    assert life.status in (-number, -other), (tmp_path / "log").read_text()
    assert life.seconds_to_end < 2.0
    assert "saving, then ending" not in (tmp_path / "log").read_text()


def test_the_second_run_on_a_folder_is_refused_until_the_first_is_gone(victims, recipe, whole, tmp_path, capsys):
    """Also when the first is killed: the lock goes with its holder."""
    lives = []
    strike, done = Strike("sft update", 1, 60.0), threading.Event()

    def first():
        slow = {"sft update": 90.0}
        lives.append(victims.run(command(recipe, tmp_path), log=tmp_path / "log", strike=strike, slow=slow, now=done))

    thread = threading.Thread(target=first)
    thread.start()
    deadline = time.monotonic() + 30
    while not (tmp_path / "run" / "checkpoints").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    status = main([str(word) for word in command(recipe, tmp_path, "--resume")])
    text = capsys.readouterr().err
    done.set()
    thread.join()
    assert lives[0].status == -9
    assert status == 2
    holder = (tmp_path / "run" / "run.lock").read_text().strip()
    assert f"is in use by {holder}. Wait for it" in text
    assert victims.run(command(recipe, tmp_path, "--resume"), log=tmp_path / "log").status == 0
    assert contents(tmp_path / "run") == contents(whole[0])


def test_help_and_docs_name_the_exit_codes(capsys):
    assert main(["train", "--help"]) == 0
    shown = capsys.readouterr().out
    page = (Path(__file__).parents[2] / "docs" / "reliability.md").read_text()
    for number in (signal.SIGINT, signal.SIGTERM):
        assert f"{EXIT_STOPPED[number]}" in shown
        assert f"| {EXIT_STOPPED[number]} |" in page


def test_a_stop_is_heard_in_windows_and_at_checks():
    stop = Stop()
    stop.check()
    with stop.window(), stop.window():
        pass
    stop.request(signal.SIGINT)  # no window: only noted
    assert stop.requested
    with pytest.raises(Stopped):
        stop.check()
    with pytest.raises(Stopped), stop.window():
        raise AssertionError("the window opened")
    other = Stop()
    with pytest.raises(Stopped), other.window():
        other.request(signal.SIGTERM)
    assert other.signal == signal.SIGTERM


def test_checkpoints_of_a_stop_hold_the_turn(victims, recipe, tmp_path):
    """What was sampled before the stop is not sampled again."""
    strike = Strike("rl update", 2, 0.5, signal.SIGTERM)
    life = victims.run(
        command(recipe, tmp_path), log=tmp_path / "log", strike=strike, slow={"rl update/micro-batch": 1.0}
    )
    assert life.status == EXIT_STOPPED[signal.SIGTERM]
    newest = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    state = json.loads((newest / "state.json").read_text())
    assert len(state["turn"]["groups"]) == 4
    assert (newest / "turn.safetensors").is_file()
