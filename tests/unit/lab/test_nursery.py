"""Runs forked from a process that has loaded the libraries: as a fresh interpreter runs them, and none outlives its owner."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from mifo.lab.nursery import Nursery

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forked children are asked to end by Linux's kernel")

CHILD = """
import json, os, signal, sys, time
import loaded
if __name__ == "__main__":
    place, seconds, how = sys.argv[1], float(sys.argv[2]), sys.argv[3]
    def note(word):
        record = {"word": word, "pid": os.getpid(), "session": os.getsid(0), "loaded": loaded.BY, "env": os.environ["COLOUR"]}
        with open(place, "a") as file:
            file.write(json.dumps(record) + "\\n")
    def saved(number, frame):
        time.sleep(0.2)
        note("saved")
        sys.exit(4)
    signal.signal(signal.SIGTERM, saved)
    note("start")
    print("to the log", sys.argv[1:], sys.stdin.read())
    time.sleep(seconds)
    if how == "raise":
        raise ValueError("as it went")
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(int(how))
"""

REFUSES_THE_SECOND = """
import os
BY, fork, asked = os.getpid(), os.fork, []
def sometimes():
    asked.append(1)
    if len(asked) == 2:
        raise OSError(11, "no room")
    return fork()
os.fork = sometimes
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "loaded.py").write_text("import os\nBY = os.getpid()\n")
    (tmp_path / "victim.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    monkeypatch.setenv("COLOUR", "green")
    return tmp_path


@pytest.fixture
def nursery(place):
    made = Nursery(environment=dict(os.environ), libraries=("loaded",))
    yield made
    made.close()


def start(nursery, place, name, seconds=0.0, how="0"):
    return nursery.start(["victim", str(place / f"{name}.notes"), str(seconds), how], place / f"{name}.log")


def notes(place, name):
    path = place / f"{name}.notes"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def until(true):
    deadline = time.monotonic() + 30
    while not true() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert true()


def gone(number):
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize(("how", "status"), [("0", 0), ("7", 7), ("raise", 1), ("kill", -signal.SIGKILL)])
def test_a_child_ends_as_the_module_does(nursery, place, how, status):
    child = start(nursery, place, "a", how=how)
    assert child.wait() == status == child.poll()
    log = (place / "a.log").read_text()
    assert log.startswith("to the log") or how == "kill"  # what was not flushed dies with it
    assert ("ValueError: as it went" in log) == (how == "raise")


def test_children_share_what_was_loaded_and_have_sessions_of_their_own(nursery, place):
    children = [start(nursery, place, name) for name in "ab"]
    for child in children:
        child.wait()
    first, second = notes(place, "a")[0], notes(place, "b")[0]
    assert first["loaded"] == second["loaded"] not in (first["pid"], second["pid"])
    assert first["session"] == first["pid"] == children[0].number
    assert first["env"] == "green"


def test_they_run_side_by_side_and_are_polled(nursery, place):
    slow, quick = start(nursery, place, "slow", 20.0), start(nursery, place, "quick")
    assert quick.wait() == 0
    assert slow.poll() is None
    slow.send_signal(signal.SIGTERM)
    until(lambda: slow.poll() is not None)
    assert slow.status == 4
    assert [note["word"] for note in notes(place, "slow")] == ["start", "saved"]
    until(lambda: gone(slow.number))  # waited for: no zombie is left


def test_an_ended_child_is_never_signalled(nursery, place, monkeypatch):
    child = start(nursery, place, "a")
    until(lambda: (place / "a.notes").exists())
    time.sleep(0.5)  # it has ended, and the owner has not looked yet
    monkeypatch.setattr(os, "kill", lambda *_: pytest.fail("a signal to a number that may be somebody else's"))
    child.send_signal(signal.SIGTERM)
    assert child.status == 0


def test_a_killed_nursery_takes_its_children_along_and_the_next_start_makes_another(nursery, place):
    child = start(nursery, place, "a", 60.0)
    until(lambda: notes(place, "a"))
    os.kill(notes(place, "a")[0]["loaded"], signal.SIGKILL)
    assert child.wait() == -signal.SIGTERM
    until(lambda: [note["word"] for note in notes(place, "a")] == ["start", "saved"])
    assert start(nursery, place, "b").wait() == 0


def test_one_that_was_killed_between_two_children_is_started_again(nursery, place):
    assert start(nursery, place, "a").wait() == 0
    os.kill(notes(place, "a")[0]["loaded"], signal.SIGKILL)
    time.sleep(0.2)
    assert start(nursery, place, "b").wait() == 0


def test_one_that_cannot_be_started_is_said_to_be(place):
    made = Nursery(environment=dict(os.environ), libraries=("nowhere_to_be_found",))
    with pytest.raises(ChildProcessError, match="ends as soon as it is started"):
        start(made, place, "a")


def test_a_child_that_ends_before_its_owner_listens_is_heard_of(nursery, place, monkeypatch):
    """Its start and its end come in one piece."""
    listen = nursery.listen

    def late(seconds):
        time.sleep(1.0)
        listen(seconds)

    monkeypatch.setattr(nursery, "listen", late)
    assert start(nursery, place, "a").wait() == 0


def test_a_system_without_room_for_a_process_refuses_one_child(place):
    """The nursery stays, and its children with it."""
    (place / "loaded.py").write_text(REFUSES_THE_SECOND)
    made = Nursery(environment=dict(os.environ), libraries=("loaded",))
    first = start(made, place, "a", 1.0)
    with pytest.raises(ChildProcessError, match="no process can be made: no room"):
        start(made, place, "b")
    assert start(made, place, "c").wait() == 0
    assert first.wait() == 0
    made.close()


def test_children_of_a_killed_owner_save_and_end(place):
    script = (
        "import os, time\nfrom pathlib import Path\nfrom mifo.lab.nursery import Nursery\n"
        f"n = Nursery(environment=dict(os.environ), libraries=('loaded',))\n"
        f"n.start(['victim', {str(place / 'a.notes')!r}, '60', '0'], Path({str(place / 'a.log')!r}))\ntime.sleep(60)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", script])
    until(lambda: notes(place, "a"))
    owner.kill()
    owner.wait()
    until(lambda: [note["word"] for note in notes(place, "a")] == ["start", "saved"])
    until(lambda: gone(notes(place, "a")[0]["loaded"]))
