"""Processes of an arena: one failure is nobody else's, a stop is passed on, and nothing outlives its parent."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from mifo.lab.arena_jobs import Job, run_jobs
from mifo.train.stop import Stop

# A child that notes its start, its signals and what it was given, like a run that saves when asked to end.
CHILD = """
import json, os, signal, sys, time
place, seconds, status = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
def note(word):
    record = {"word": word, "time": time.monotonic(), "threads": os.environ["OMP_NUM_THREADS"], "pid": os.getpid()}
    with open(place, "a") as file:
        file.write(json.dumps(record) + "\\n")
def saved(number, frame):
    time.sleep(0.2)
    note("saved")
    sys.exit(4)
signal.signal(signal.SIGTERM, saved)
note("start")
time.sleep(seconds)
note("end")
print("a line\\nmifo: this went wrong" if status else "fine")
sys.exit(status)
"""


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """Makes jobs of `CHILD`, and reads their notes."""
    (tmp_path / "victim.py").write_text(CHILD)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))

    class Workshop:
        finished: list[str] = []  # noqa: RUF012
        folder = tmp_path

        def job(self, name, *stages):
            commands = [["victim", str(tmp_path / f"{name}.notes"), str(s), str(status)] for s, status in stages]
            return Job(
                name=name,
                log=tmp_path / f"{name}.log",
                prepare=lambda: commands,
                done=lambda: self.finished.append(name),
            )

        def notes(self, name):
            path = tmp_path / f"{name}.notes"
            return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    Workshop.finished = []
    return Workshop()


def run(jobs, *, at_once=2, stop=None):
    ended = []
    outcomes = run_jobs(jobs, at_once=at_once, threads=3, stop=stop or Stop(), ended=ended.append)
    assert ended == outcomes
    return outcomes


def test_a_failed_job_is_reported_and_stops_no_other(workshop):
    jobs = [workshop.job("bad", (0, 7), (0, 0)), workshop.job("good", (0, 0), (0, 0)), workshop.job("later", (0, 0))]
    outcomes = {outcome.name: outcome.reason for outcome in run(jobs)}
    assert outcomes == {"bad": "this went wrong (status 7)", "good": None, "later": None}
    assert sorted(workshop.finished) == ["good", "later"]
    assert [n["word"] for n in workshop.notes("bad")] == ["start", "end"]  # its second command was not begun
    assert [n["word"] for n in workshop.notes("good")] == ["start", "end"] * 2
    assert {n["threads"] for n in workshop.notes("good")} == {"3"}


def test_what_cannot_be_prepared_or_tidied_up_is_a_failure_of_its_own(workshop):
    def refuse():
        raise OSError(28, "no space left")

    jobs = [workshop.job(name, (0, 0)) for name in ("a", "b", "c")]
    jobs[0] = replace(jobs[0], prepare=refuse)
    jobs[1] = replace(jobs[1], done=refuse)
    outcomes = {outcome.name: outcome.reason for outcome in run(jobs)}
    assert outcomes == {"a": "[Errno 28] no space left", "b": "[Errno 28] no space left", "c": None}


def test_a_killed_child_s_reason_is_the_signal(workshop):
    job = workshop.job("a", (60, 0))

    def kill():
        while not workshop.notes("a"):
            time.sleep(0.02)
        os.kill(workshop.notes("a")[0]["pid"], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    (outcome,) = run([job])
    thread.join()
    assert outcome.reason == "killed by signal 9"


def test_a_reason_is_of_this_start_alone(workshop):
    (workshop.folder / "bad.log").write_text("mifo: an old reason\n")
    (outcome,) = run([workshop.job("bad", (0, 1))])
    assert outcome.reason == "this went wrong (status 1)"
    assert (workshop.folder / "bad.log").read_text().startswith("mifo: an old reason\n")


def test_so_many_at_once_and_no_more(workshop):
    run([workshop.job(f"j{i}", (0.5, 0)) for i in range(4)], at_once=2)
    spans = [tuple(n["time"] for n in workshop.notes(f"j{i}")) for i in range(4)]
    at_starts = [sum(s <= start < e for s, e in spans) for start, _ in spans]
    assert max(at_starts) == 2


def test_a_stop_reaches_children_and_waits_for_them(workshop):
    stop = Stop()

    def ask():
        while not (workshop.notes("a") and workshop.notes("b")):
            time.sleep(0.02)
        stop.request(signal.SIGINT)

    thread = threading.Thread(target=ask)
    thread.start()
    outcomes = run([workshop.job(name, (60, 0)) for name in "abc"], stop=stop)
    thread.join()
    assert outcomes == []
    for name in "ab":
        assert [n["word"] for n in workshop.notes(name)] == ["start", "saved"]
    assert workshop.notes("c") == []


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at a parent's death is Linux's")
def test_children_of_a_killed_arena_are_asked_to_end(workshop):
    script = (
        "from pathlib import Path\nfrom mifo.lab.arena_jobs import Job, run_jobs\nfrom mifo.train.stop import Stop\n"
        f"job = Job(name='a', log=Path({str(workshop.folder / 'a.log')!r}), "
        f"prepare=lambda: [['victim', {str(workshop.folder / 'a.notes')!r}, '60', '0']], done=lambda: None)\n"
        "run_jobs([job], at_once=1, threads=1, stop=Stop(), ended=print)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 30
    while not workshop.notes("a") and time.monotonic() < deadline:
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    while len(workshop.notes("a")) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [n["word"] for n in workshop.notes("a")] == ["start", "saved"]


def test_a_job_waits_for_the_one_it_comes_after_and_fails_with_it(workshop):
    jobs = [workshop.job("first", (0.3, 0)), workshop.job("bad", (0, 1))]
    jobs += [
        replace(workshop.job(name, (0, 0)), after=after) for name, after in (("second", "first"), ("never", "bad"))
    ]
    outcomes = {outcome.name: outcome.reason for outcome in run(jobs, at_once=4)}
    assert outcomes["never"] == "bad, which it starts from, failed"
    assert workshop.notes("never") == []
    assert outcomes["second"] is None
    assert workshop.notes("second")[0]["time"] >= workshop.notes("first")[-1]["time"]
