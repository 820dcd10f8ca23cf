"""Workers that turn on their parent: every call answers in time, nothing is left, the next comparison is graded.

The hostile action is planted in the worker's start command, in place of the mathematics libraries; nothing in a model's
text or in a configuration leads there. MIFO_HOSTILE_ROUNDS repeats the list (20 rounds in a campaign, one here).
"""

import ast
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mifo.errors import RewardError
from mifo.rewards import template
from mifo.rewards.math import Comparison
from mifo.rewards.pool import WorkerPool
from mifo.types import Verdict

ROUNDS = int(os.environ.get("MIFO_HOSTILE_ROUNDS", "1"))
LIMIT = 0.4
SLACK = 1.0
GOOD = Comparison("good", ("answer",))

PLANT = """
import sys, types, os, signal, time, struct, ctypes, resource
from mifo.rewards import confine, wire
fake = types.ModuleType("mifo.rewards.compare")
sys.modules["mifo.rewards.compare"] = fake
fake.GENERATORS = frozenset()
fake.warm_up = lambda: None
fake.UnreadableGoldError = type("UnreadableGoldError", (Exception,), {})
REPLIES = 3
def raw(data):
    while data: data = data[os.write(REPLIES, data):]
def loop():
    while True: pass
def recurse(): recurse()
def ignore_signals():
    for number in range(1, 65):
        try: signal.signal(number, lambda *a: None)
        except (OSError, ValueError): pass
    loop()
def fork_bomb():
    for _ in range(7): os.fork()
    time.sleep(1000)
def daemon():
    if os.fork() == 0:
        os.setsid()
        os.fork()
        time.sleep(1000)
    raise SystemExit
def deep_stack():
    sys.setrecursionlimit(10**9)
    f = lambda g: g(g)
    f(f)
def trickle():
    raw(struct.pack(">I", 1 << 20))
    while True: raw(b"x"); time.sleep(0.005)
def twice():
    good = wire.pack({"id": 1, "verdict": "correct", "leaving": False})
    raw(good + good)
    loop()
def ahead():
    raw(wire.pack({"id": 10**6, "verdict": "correct", "leaving": False}))
    loop()
def flood():
    while True: raw(b"\\xff" * 65536)
def shout():
    for _ in range(1000): sys.stdout.write("x" * 10**6); sys.stdout.flush()
def hoard():
    kept = [bytearray(10**9) for _ in range(10)]
ACTIONS = {
    "loop": loop, "sleep": lambda: time.sleep(1000), "ignore signals": ignore_signals, "fork bomb": fork_bomb,
    "daemon": daemon, "10 GB": hoard, "10 GB at once": lambda: bytearray(10**10), "1 GB of output": shout,
    "1 GB of replies": flood, "trickle": trickle, "two replies": twice, "reply ahead": ahead,
    "nonsense": lambda: (raw(struct.pack(">I", 9) + b"not json!"), loop()),
    "deep json": lambda: (raw(struct.pack(">I", 900000) + b"[" * 900000), loop()),
    "no verdict": lambda: (raw(wire.pack({"id": 1, "verdict": "splendid", "leaving": False})), loop()),
    "list": lambda: (raw(struct.pack(">I", 2) + b"[]"), loop()),
    "stop": lambda: (os.kill(os.getpid(), signal.SIGSTOP), loop()),
    "exit": lambda: os._exit(0), "abort": os.abort, "segfault": lambda: ctypes.string_at(0),
    "recursion": recurse, "deep stack": deep_stack, "close": lambda: (os.closerange(0, 10), loop()),
    "power tower": lambda: 9 ** 9 ** 9, "factorial": lambda: __import__("math").factorial(10**8),
    "eval": lambda: eval("1 + 1"), "system": lambda: os.system("sleep 1000") and loop(),
    "write": lambda: open(os.environ["TMPDIR"] + "/planted", "w"),
    "kill parent": lambda: os.kill(os.getppid(), signal.SIGTERM),
    "more cpu": lambda: (resource.setrlimit(resource.RLIMIT_CPU, (10**6, 10**6)), loop()),
}
def equal(gold, parts):
    if gold in ACTIONS:
        ACTIONS[gold]()
        return False
    if gold == "patricide":
        os.kill(os.getppid(), signal.SIGKILL)
    if gold in ("patricide", "nap"):
        time.sleep(0.2)
    return gold in ("good", "nap")
fake.equal = equal
"""
UNCONFINED = "confine.refuse_system_calls = lambda program: None\n"
_TABLE = ast.parse(PLANT[PLANT.index("ACTIONS = {") : PLANT.index("def equal")]).body[0].value
ACTIONS = [key.value for key in _TABLE.keys]
# Without the filter on system calls a process may leave its group; the others are bounded all the same.
UNCONFINED_ACTIONS = [name for name in ACTIONS if name not in ("daemon", "kill parent", "system", "write")]


@pytest.fixture
def hostile(monkeypatch, tmp_path):
    """A pool whose workers carry the plant, and a list of the processes that carry its mark."""
    pools = []

    def make(*, confined=True, workers=1):
        plant = PLANT + ("" if confined else UNCONFINED)
        monkeypatch.setattr(template, "BOOT", ORIGINAL.replace("from mifo", f"exec({plant!r}); from mifo", 1))
        monkeypatch.setenv("TMPDIR", str(tmp_path))
        made = WorkerPool(workers=workers, seconds_per_answer=LIMIT, memory_mib=512)
        pools.append(made)
        return made

    yield make
    for made in pools:
        made.close()


ORIGINAL = template.BOOT


def marked(folder):
    """Processes, zombies aside, whose environment names this folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            environment = (entry / "environ").read_bytes()
            state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if f"TMPDIR={folder}".encode() in environment.split(b"\0") and state != "Z":
            found.append(int(entry.name))
    return found


def left_after(folder, seconds=3.0):
    until = time.monotonic() + seconds
    while marked(folder) and time.monotonic() < until:
        time.sleep(0.02)
    return marked(folder)


def attack(made, name):
    """The verdict on a hostile action and the seconds it took past the limit; a ready worker takes it."""
    assert made.run([GOOD]) == [Verdict.CORRECT]
    start = time.monotonic()
    (verdict,) = made.run([Comparison(name, ("x",))])
    return verdict, time.monotonic() - start - LIMIT


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc and needs the system call filter")
@pytest.mark.parametrize("name", ACTIONS)
def test_a_hostile_worker_costs_one_verdict(hostile, tmp_path, name, record_property):
    made = hostile()
    for _ in range(ROUNDS):
        verdict, late = attack(made, name)
        record_property("late", late)
        assert verdict in (Verdict.ERROR, Verdict.TIMEOUT)
        assert late < SLACK
        assert made.run([GOOD] * 3) == [Verdict.CORRECT] * 3
        assert len(marked(tmp_path)) <= 2  # the worker and the template it is forked from, none of its children
    made.close()
    assert left_after(tmp_path) == []
    assert not (tmp_path / "planted").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", UNCONFINED_ACTIONS)
def test_the_parent_alone_is_enough_within_the_process_group(hostile, tmp_path, name, record_property):
    made = hostile(confined=False)
    for _ in range(ROUNDS):
        verdict, late = attack(made, name)
        record_property("late", late)
        assert verdict in (Verdict.ERROR, Verdict.TIMEOUT)
        assert late < SLACK
        assert made.run([GOOD]) == [Verdict.CORRECT]
    made.close()
    assert left_after(tmp_path) == []


def test_hostile_and_honest_comparisons_share_a_call(hostile, tmp_path):
    made = hostile(workers=3)
    names = random.Random(0).sample(ACTIONS, 12)
    tasks = [task for name in names for task in (GOOD, Comparison(name, ("x",)))]
    verdicts = made.run(tasks)
    assert verdicts[::2] == [Verdict.CORRECT] * len(names)
    assert set(verdicts[1::2]) <= {Verdict.ERROR, Verdict.TIMEOUT}
    made.close()
    assert left_after(tmp_path) == []


def test_throughput_recovers(hostile):
    made = hostile()
    made.run([GOOD])
    rates = []
    for hostile_first in (False, True):
        if hostile_first:
            made.run([Comparison("loop", ("x",)), Comparison("exit", ("x",))])
            made.run([GOOD])
        start = time.process_time()
        made.run([GOOD] * 300)
        rates.append(time.process_time() - start)
    assert rates[1] < 3 * rates[0] + 0.1  # processor time of the parent: it does not depend on who else is running


@pytest.mark.parametrize("name", ["exit", "loop"])
def test_after_any_number_of_hostile_calls_a_call_waits_for_a_fork_alone(hostile, name):
    """The libraries are not loaded again: the template's process is the same, and no worker starts an interpreter."""
    made = hostile()
    made.run([GOOD])
    process, waited = made._template.process.pid, []
    for _ in range(4):
        made.run([Comparison(name, ("x",))])
        start = time.monotonic()
        assert made.run([GOOD]) == [Verdict.CORRECT]
        waited.append(time.monotonic() - start)
    assert made._template.process.pid == process
    assert max(waited) < LIMIT + SLACK  # from when it was submitted, not from when a worker took it
    for _ in range(3):
        start = time.monotonic()
        made.run([Comparison("exit", ("x",))] * 10)
        assert time.monotonic() - start < 10 * (LIMIT + SLACK)


def test_loading_the_libraries_again_would_be_seen(hostile, monkeypatch):
    """What is loaded before the first worker is ready, here slowed to 2 s, is not loaded again for those after it."""
    made = hostile()
    monkeypatch.setattr(template, "BOOT", f"import time; time.sleep(2); {template.BOOT}")
    start = time.monotonic()
    made.run([GOOD])
    assert time.monotonic() - start > 2.0
    start = time.monotonic()
    assert made.run([Comparison("exit", ("x",)), GOOD]) == [Verdict.ERROR, Verdict.CORRECT]
    assert time.monotonic() - start < LIMIT + SLACK


def test_what_is_started_ahead_is_what_takes_the_first_comparison(hostile):
    made = hostile()
    made.start_ahead()
    made.start_ahead()
    process, [worker] = made._template.process.pid, made._workers
    assert not worker.ready  # nobody waited
    assert made.run([GOOD]) == [Verdict.CORRECT]
    assert (made._template.process.pid, made._workers) == (process, [worker])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_template_that_is_killed_is_made_again(hostile, tmp_path, number):
    made = hostile(workers=2)
    made.run([GOOD] * 2)
    before = made._template.process.pid
    os.kill(before, number)
    if number == signal.SIGKILL:
        made._template.process.wait()
        assert left_after(tmp_path) == []  # its workers went with it
    assert made.run([GOOD] * 4 + [Comparison("exit", ("x",))] + [GOOD] * 2)[:4] == [Verdict.CORRECT] * 4
    assert (made._template.process.pid == before) == (number == signal.SIGTERM)  # ignored: the parent decides
    made.close()
    assert left_after(tmp_path) == []


def test_what_is_under_way_when_the_template_is_killed_is_compared_again(hostile, tmp_path):
    made = hostile(workers=2)
    made.run([GOOD] * 2)
    killer = threading.Timer(0.1, os.kill, (made._template.process.pid, signal.SIGKILL))
    killer.start()
    assert made.run([Comparison("nap", ("x",))] * 4) == [Verdict.CORRECT] * 4
    killer.join()
    made.close()
    assert left_after(tmp_path) == []


def test_a_comparison_that_kills_the_template_is_made_twice_at_most(hostile):
    made = hostile(confined=False)
    assert made.run([Comparison("patricide", ("x",)), GOOD]) == [Verdict.ERROR, Verdict.CORRECT]


def test_a_template_that_dies_while_many_workers_start_is_one_failure(hostile, tmp_path):
    made = hostile(workers=6)
    killed = []

    def strike():
        while not made._template:
            time.sleep(0.01)
        killed.append(made._template.process.pid)
        os.kill(killed[0], signal.SIGKILL)  # while it loads, and six workers wait for it

    thread = threading.Thread(target=strike)
    thread.start()
    assert made.run([GOOD] * 12) == [Verdict.CORRECT] * 12
    thread.join()
    assert made._template.process.pid != killed[0]
    made.close()
    assert left_after(tmp_path) == []


FORKS_ONCE = """
import os
forks = [os.fork]
def fork():
    if not forks: raise OSError(11, "no room")
    return forks.pop()()
os.fork = fork
"""


def test_a_fork_that_fails_is_said(hostile, monkeypatch):
    made = hostile()
    monkeypatch.setattr(template, "BOOT", f"exec({FORKS_ONCE!r}); {template.BOOT}")
    assert made.run([GOOD]) == [Verdict.CORRECT]
    assert made.run([Comparison("exit", ("x",))]) == [Verdict.ERROR]
    with pytest.raises(RewardError, match=r"no worker could be forked: .*no room"):
        made.run([GOOD])


def test_an_answer_larger_than_a_pipe_does_not_block_the_parent(hostile):
    made = hostile(confined=False)
    made.run([GOOD])
    os.kill(made.process_ids[0], signal.SIGSTOP)
    start = time.monotonic()
    assert made.run([Comparison("good", ("x" * 900_000,))]) == [Verdict.TIMEOUT]
    assert time.monotonic() - start < LIMIT + SLACK
    assert made.run([Comparison("good", ("x" * 900_000,))]) == [Verdict.CORRECT]


def test_workers_killed_at_any_moment_cost_at_most_the_comparison_under_way(hostile, tmp_path):
    made = hostile(workers=2)
    draw, stop, killed = random.Random(1), threading.Event(), []

    def strike():
        while not stop.is_set():
            time.sleep(draw.random() * 0.05)
            ready = made.process_ids
            for pid in ready[:1]:
                os.kill(pid, draw.choice((signal.SIGKILL, signal.SIGSTOP)))
                killed.append(pid)

    thread = threading.Thread(target=strike)
    thread.start()
    try:
        for _ in range(10 * ROUNDS):
            start = time.monotonic()
            verdicts = made.run([GOOD] * 10)
            assert set(verdicts) <= {Verdict.CORRECT, Verdict.ERROR, Verdict.TIMEOUT}
            assert len(verdicts) == 10
            assert time.monotonic() - start < 10 * (LIMIT + SLACK)
    finally:
        stop.set()
        thread.join()
    assert killed
    made.run([GOOD] * 4)  # a worker stopped while idle is found by the deadline, not before
    assert made.run([GOOD] * 4) == [Verdict.CORRECT] * 4
    made.close()
    assert left_after(tmp_path) == []


def test_workers_get_no_secrets(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "canary-value")
    made = WorkerPool(workers=1, seconds_per_answer=20.0, memory_mib=2048)
    made.run([Comparison("2", ("1+1",))])
    environment = Path(f"/proc/{made.process_ids[0]}/environ").read_bytes()
    made.close()
    assert b"canary-value" not in environment
    assert b"PYTHONHASHSEED=0" in environment


ORPHAN = """
import os, signal, sys, threading
from mifo.rewards import pool, template
from mifo.rewards.math import Comparison
plant = sys.argv[1]
template.BOOT = template.BOOT.replace("from mifo", f"exec({plant!r}); from mifo", 1)
made = pool.WorkerPool(workers=1, seconds_per_answer=600.0, memory_mib=512)
made.run([Comparison("good", ("x",))])
print(*made.process_ids, flush=True)
threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()
made.run([Comparison("ignore signals", ("x",))])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's signal at a parent's death is Linux's")
def test_a_worker_that_ignores_signals_dies_with_its_parent(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", ORPHAN, PLANT],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert done.stdout.split(), done.stderr
    assert left_after(tmp_path) == []
