"""Coding answers: what is taken from a response, how tests are read, and verdicts that the program cannot forge."""

import json
import os
import shutil
import socket
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from mifo.errors import RewardError
from mifo.rewards import Answer, Grader
from mifo.rewards.code import Task, decide, parse_tests, program_of
from mifo.rewards.sandbox import Sandbox
from mifo.types import Verdict

LIMIT = 2.0
C, W, E, T = Verdict.CORRECT, Verdict.WRONG, Verdict.ERROR, Verdict.TIMEOUT


def fenced(program, mark="python"):
    return f"Here it is.\n```{mark}\n{program}\n```\nDone."


def why_not_here():
    sandbox = Sandbox(seconds_per_answer=30.0, memory_mib=1024, unsafe=False)
    try:
        sandbox.require()
    except RewardError as error:
        return str(error)
    return None


MISSING = why_not_here()
needs_sandbox = pytest.mark.skipif(MISSING is not None, reason=f"no sandbox: {MISSING}")


@pytest.fixture(
    scope="module", params=[pytest.param(True, marks=needs_sandbox, id="sandbox"), pytest.param(False, id="unsafe")]
)
def sandbox(request):
    made = Sandbox(seconds_per_answer=LIMIT, memory_mib=512, unsafe=True)
    if request.param:
        made.require()
        assert made.confined
    else:
        made._prefix = []  # as where bubblewrap is missing
    return made


@pytest.fixture(scope="module")
def confined():
    made = Sandbox(seconds_per_answer=LIMIT, memory_mib=512, unsafe=False)
    made.require()
    return made


def judge(sandbox, program, gold):
    return sandbox.judge(Task(gold, program).job)


# --- extraction and tests -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "program"),
    [
        (fenced("x = 1"), "x = 1"),
        (fenced("x = 1", ""), "x = 1"),
        (fenced("x = 1", "Python"), "x = 1"),
        (fenced("x = 1", "py") + fenced("x = 2"), "x = 2"),
        (fenced("x = 1") + "\n```text\n1\n```", "x = 1"),  # a block of output is no program
        (fenced("x = 1") + "\n```python\nx = 2", "x = 1"),  # cut off
        ("<think>\n" + fenced("x = 1") + "</think>" + fenced("x = 2"), "x = 2"),
        ("<think>\n" + fenced("x = 1") + "</think> none", None),
        ("x = 1", None),
        ("```\n```", ""),
        ("", None),
    ],
)
def test_the_last_fenced_block_is_the_program(response, program):
    assert program_of(response) == program


@pytest.mark.parametrize("unit", ["```", "```\n", "```python\n", "`", "\n"])
def test_extraction_is_linear(unit):
    start = time.process_time()
    program_of(unit * (1_000_000 // len(unit)))
    assert time.process_time() - start < 2.0


@pytest.mark.parametrize(
    ("gold", "expected"),
    [
        ("assert f(1) == 2", {"test": "assert f(1) == 2", "cases": None, "entry_point": None}),
        (json.dumps(["assert f(1) == 2", "assert f(2) == 3"]), {"test": "assert f(1) == 2\nassert f(2) == 3"}),
        (json.dumps({"test_list": ["assert f(1)"], "test_setup_code": "import math"}), {"setup": "import math"}),
        (json.dumps({"test": "def check(candidate): pass", "entry_point": "f"}), {"entry_point": "f"}),
        (json.dumps({"inputs": ["1\n"], "outputs": ["2\n"]}), {"cases": [["1\n", "2\n"]], "entry_point": None}),
        (json.dumps({"inputs": [["1", "2"]], "outputs": [["3"]]}), {"cases": [["1\n2", "3"]]}),
        (json.dumps({"inputs": [[1]], "outputs": [2], "fn_name": "f"}), {"cases": [[[1], 2]], "entry_point": "f"}),
        (json.dumps([{"input": "1", "output": "2"}]), {"cases": [["1", "2"]]}),
    ],
)
def test_forms_of_tests(gold, expected):
    assert expected.items() <= parse_tests(gold).items()


@pytest.mark.parametrize(
    "gold",
    [
        "{",
        "{}",
        "[1]",
        "[]",
        '{"inputs": [], "outputs": []}',
        '{"inputs": ["1"], "outputs": []}',
        '{"inputs": 1, "outputs": 1}',
        '{"inputs": ["1"], "outputs": [1], "fn_name": "f"}',
        '{"test": 3}',
        "[" * 100000,
    ],
)
def test_tests_that_cannot_be_read_are_the_users_error(gold):
    with pytest.raises(RewardError, match="grader 'code'"):
        decide(gold, fenced("x = 1"))


# --- verdicts -----------------------------------------------------------------------------------------------------------

DOUBLE = "def f(x):\n    return 2 * x\n"


def checks(*conditions, entry="f", setup=""):
    """Tests as HumanEval has them: a function `check` of the candidate."""
    lines = "\n".join(f"    assert {condition}" for condition in conditions)
    return json.dumps({"test": f"def check(candidate):\n{lines}", "entry_point": entry, "setup": setup})


CHECK = checks("candidate(3) == 6", "candidate(0) == 0")
RAISES = "try:\n    f(1)\nexcept {}:\n    pass\nelse:\n    assert False"
IN_A_THREAD = """
import threading
def f(x):
    out = []
    thread = threading.Thread(target=lambda: out.append(2 * x))
    thread.start()
    thread.join()
    return out[0]
"""
VALUES = "assert f() == {value}\nassert type(f()) is type({value})"


@pytest.mark.parametrize(
    ("program", "gold", "verdict"),
    [
        (DOUBLE, "assert f(2) == 4", C),
        (DOUBLE, "assert f(2) == 5", W),
        (DOUBLE, "assert f(2) == 4\nassert f(3) == 7", W),
        (DOUBLE, CHECK, C),
        ("def f(x):\n    return 6", CHECK, W),
        ("def g(x):\n    return 2 * x", CHECK, W),
        ("syntax error", CHECK, W),
        ("", CHECK, W),
        (DOUBLE, json.dumps({"inputs": [[1], [2]], "outputs": [2, 4], "fn_name": "f"}), C),
        (DOUBLE, json.dumps({"inputs": [[1], [2]], "outputs": [2, 5], "fn_name": "f"}), W),
        ("def f(x):\n    return (x, x)", json.dumps({"inputs": [[1]], "outputs": [[1, 1]], "fn_name": "f"}), C),
        ("print(2 * int(input()))", json.dumps({"inputs": ["1\n", "2"], "outputs": ["2\n", "4\n"]}), C),
        ("print(2 * int(input()))", json.dumps({"inputs": ["1\n", "2"], "outputs": ["2\n", "5\n"]}), W),
        ("import sys\nfor x in sys.stdin:\n    print(x.strip(), ' ')", json.dumps([{"input": "a\nb\n", "output": "a\nb"}]), C),
        ("print(0.50)", json.dumps([{"input": "", "output": "0.5"}]), C),
        ("print(1)\nraise ValueError", json.dumps([{"input": "", "output": "1"}]), W),
        ("print(1)\nraise SystemExit(0)", json.dumps([{"input": "", "output": "1"}]), C),
        ("if __name__ == '__main__':\n    print(1)", json.dumps([{"input": "", "output": "1"}]), C),
        ("class Solution:\n    def f(self, x):\n        return 2 * x", checks("candidate(x=1) == 2", entry="Solution().f"), C),
        ("def f(x):\n    raise ValueError('no')", RAISES.format("ValueError"), C),
        ("class Odd(KeyError): pass\ndef f(x):\n    raise Odd('no')", RAISES.format("KeyError"), C),
        ("def f(x):\n    raise ValueError('no')", "assert f(1) == 2", W),
        ("def f(x):\n    yield x", "assert list(f(1)) == [1]", C),
        ("def f(x):\n    yield x", "assert f(1) == [1]", W),
        ("def f(x):\n    return object()", "assert f(1) == 1", W),
        ("def f(x):\n    import math, heapq, collections, itertools, re\n    return 2 * x", "assert f(2) == 4", C),
        ("def f(n):\n    return n if n < 2 else f(n - 1) + f(n - 2)", "assert f(15) == 610", C),
        (IN_A_THREAD, "assert f(2) == 4", C),
        (DOUBLE, "import nowhere_to_be_found\nassert f(2) == 4", E),
        (DOUBLE, "assert f(2) == 4 +", E),
        (DOUBLE, "assert 1 == 1", E),
        (DOUBLE, "assert 1 == 2", E),
        (DOUBLE, "assert f(object()) == 4", E),
        (DOUBLE, checks("helper(candidate(2)) == 5"), E),
        (DOUBLE, checks("helper(candidate(2)) == 5", setup="def helper(x):\n    return x + 1"), C),
    ],
)  # fmt: skip
def test_verdicts(sandbox, program, gold, verdict):
    found = judge(sandbox, program, gold)
    assert found.verdict is verdict, found


@pytest.mark.parametrize(
    "value",
    [
        "None",
        "True",
        "3",
        "-2.5",
        "'text'",
        "b'bytes'",
        "[1, [2, (3,)]]",
        "(1, 2)",
        "{1: 'a', (2, 3): [4]}",
        "{1, 2}",
        "10 ** 3000",
        "frozenset({1})",
        "range(3)",
        "1 + 2j",
        "float('inf')",
        "'\\ud800'",
        "[]",
        "{}",
        "''",
        "{'t': 'tuple', 'v': []}",
    ],
)
def test_plain_values_cross_in_both_directions(sandbox, value):
    assert judge(sandbox, f"def f():\n    return {value}", VALUES.format(value=value)).verdict is C
    back = "def f(x):\n    return type(x).__name__, x"
    assert judge(sandbox, back, f"assert f({value}) == (type({value}).__name__, {value})").verdict is C


# --- what a program may try ---------------------------------------------------------------------------------------------

NAIVE = "assert f(2) == 5, 'no program gives 5 honestly'"


@dataclass(frozen=True)
class Hostile:
    program: str
    needs_sandbox: bool
    verdict: Verdict


def hostile_programs(kind):
    """Programs of one kind by name."""
    text = Path(__file__).with_name("hostile_programs.txt").read_text(encoding="utf-8")
    found = {}
    for part in text.split("### ")[1:]:
        heading, _, program = part.partition("\n")
        name, verdict = heading.removeprefix(f"{kind}: ").split(" -> ")
        if heading.startswith(f"{kind}: "):
            found[name] = Hostile(program, "(sandbox)" in name, Verdict(verdict))
    return found


FORGERIES, USES_UP = hostile_programs("forgery"), hostile_programs("use")


def skip_outside(sandbox, hostile):
    if hostile.needs_sandbox and not sandbox.confined:
        pytest.skip("reaches for other processes of the machine: never run without a sandbox")


@pytest.mark.parametrize("name", FORGERIES)
def test_a_program_cannot_forge_the_verdict(sandbox, name):
    skip_outside(sandbox, FORGERIES[name])
    start = time.monotonic()
    found = judge(sandbox, FORGERIES[name].program, NAIVE)
    assert found.verdict in (W, T), found  # the latter on a machine that is very busy
    assert time.monotonic() - start < LIMIT + 1.0


def test_input_output_programs_cannot_forge_either(sandbox):
    gold = json.dumps([{"input": "1", "output": "secret 5"}])
    for program in (
        "import os\nos._exit(0)",
        "import os, glob\nfor fd in range(200):\n    try: os.write(fd, b'secret 4')\n    except OSError: pass",
        "print('correct')",
        'import os\nfor fd in range(3, 50):\n    try: os.write(fd, b\'{"value": "secret 5"}\\n\')\n    except OSError: pass',
    ):
        found = judge(sandbox, program, gold)
        expected = (W, C) if "secret 5" in program else (W,)  # a program that knows the output may as well print it
        assert found.verdict in expected, found


@pytest.mark.parametrize("name", USES_UP)
def test_what_a_program_uses_up_is_bounded_and_nothing_is_left(sandbox, name):
    skip_outside(sandbox, USES_UP[name])
    before = processes()
    start = time.monotonic()
    found = judge(sandbox, USES_UP[name].program, NAIVE)
    assert time.monotonic() - start < LIMIT + 1.0
    assert found.verdict in (USES_UP[name].verdict, T), found
    until = time.monotonic() + 2.0
    while (left := processes() - before) and time.monotonic() < until:
        time.sleep(0.02)
    assert not left
    assert judge(sandbox, DOUBLE, "assert f(2) == 4").verdict is C


def processes():
    """Processes that this one started, by their command."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if b"The checker runs the tests and never a line of the program" in command:
                found.add(int(entry.name))
    return found


def test_an_input_output_flood_is_bounded(sandbox):
    gold = json.dumps([{"input": "", "output": "x"}])
    assert judge(sandbox, "while True: print('x' * 1000)", gold).verdict is W


@needs_sandbox
def test_an_input_output_program_cannot_fork(confined):
    gold = json.dumps([{"input": "", "output": "x"}])
    assert judge(confined, "import os\nwhile True: os.fork()", gold).verdict is W


# --- escapes from bubblewrap --------------------------------------------------------------------------------------------


def seen(confined, expression, imports="os"):
    """What an expression gives inside, as text; the exception's name where it raises."""
    program = f"import {imports}\ndef f():\n    return str({expression})"
    found = judge(confined, program, "raise AssertionError('<' + f() + '>')")
    assert found.verdict is W, found
    return found.why


@needs_sandbox
@pytest.mark.parametrize(
    "path", ["/etc/passwd", "/etc/shadow", "/root/.bashrc", "/home", "/var", "/proc/1/environ", "/sys", __file__]
)
def test_files_outside_are_not_there(confined, path):
    assert "Error" in seen(confined, f"os.listdir({path!r}) if os.path.isdir({path!r}) else open({path!r}).read()")


@needs_sandbox
@pytest.mark.parametrize(
    "path", ["/x", "/usr/x", "/dev/x", "/etc/x", "/proc/sys/kernel/hostname", "/root/x", os.__file__]
)
def test_the_system_is_read_only(confined, path):
    assert "Error" in seen(confined, f"open({path!r}, 'a')")


@needs_sandbox
def test_the_places_that_can_be_written_are_small_and_forgotten(confined):
    program = """
def f(folder):
    written = 0
    try:
        for i in range(100):
            with open(f"{folder}/{i}", "wb") as file:
                file.write(b"x" * 1_000_000)
            written += 1
    except OSError:
        pass
    return written
"""
    for folder in ("/tmp", "/dev/shm"):
        assert judge(confined, program, f"n = f({folder!r})\nassert 0 < n < 20, n").verdict is C
    assert judge(confined, "import os\ndef f():\n    return os.listdir('/dev/shm')", "assert f() == []").verdict is C


@needs_sandbox
def test_no_network_not_even_loopback(confined):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        came = threading.Event()
        server.settimeout(3.0)

        def wait():
            try:
                server.accept()
                came.set()
            except TimeoutError:
                pass

        thread = threading.Thread(target=wait)
        thread.start()
        assert "Error" in seen(confined, f"socket.create_connection(('127.0.0.1', {port}), 2)", "socket")
        thread.join()
        assert not came.is_set()
    assert "Error" in seen(confined, "socket.socket(socket.AF_UNIX)", "socket")


@needs_sandbox
def test_no_environment_no_rights_no_other_processes(confined, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "canary-value")
    assert "canary" not in seen(confined, "dict(os.environ)")
    assert "canary" not in seen(confined, "open('/proc/self/environ').read()")
    program = """
import os
def f():
    lines = open("/proc/self/status").read().splitlines()
    status = dict(line.split(":\\t", 1) for line in lines if ":\\t" in line)
    processes = sum(name.isdigit() for name in os.listdir("/proc"))
    own = os.getuid(), os.geteuid(), os.getgid(), os.getgroups()
    return *own, status["CapEff"], status["CapPrm"], status["NoNewPrivs"], processes
"""
    test = (
        "uid, euid, gid, groups, effective, permitted, no_new, count = f()\n"
        "assert uid == euid == gid and uid > 1000 or uid == 65534, uid\nassert set(groups) <= {gid, 65534}, groups\n"
        "assert int(effective, 16) == int(permitted, 16) == 0\nassert no_new.strip() == '1'\nassert count <= 3, count"
    )
    found = judge(confined, program, test)
    assert found.verdict is C, found


@needs_sandbox
@pytest.mark.skipif(os.geteuid() != 0, reason="only root has a user to leave")
def test_root_runs_programs_as_nobody_from_outside_too(confined):
    thread = threading.Thread(target=judge, args=(confined, "import time\ndef f():\n    time.sleep(1000)", "f()"))
    thread.start()
    found, until = set(), time.monotonic() + LIMIT
    while time.monotonic() < until:
        for pid in processes():
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                if b"bwrap" not in command:
                    found.add(
                        os.stat(f"/proc/{pid}").st_uid
                        if False
                        else int(Path(f"/proc/{pid}/status").read_text().split("Uid:")[1].split()[0])
                    )
            except (OSError, IndexError):
                continue
        time.sleep(0.05)
    thread.join()
    assert any(user >= 61_184 for user in found), found


@needs_sandbox
@pytest.mark.parametrize(
    "call",
    [
        "os.fork()",
        "os.execv('/bin/sh', ['sh'])",
        "os.unshare(0x10000000)" if hasattr(os, "unshare") else "os.setns(0)",
        "os.chroot('/')",
        "os.setuid(0)",
        "os.kill(1, 9)",
        "os.mount",
    ],
)
def test_calls_into_the_kernel_are_refused(confined, call):
    assert "Error" in seen(confined, call)


# --- refusal ------------------------------------------------------------------------------------------------------------


def test_without_bubblewrap_programs_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    canary = tmp_path / "canary"
    program = fenced(f"open({str(canary)!r}, 'w')\ndef f(x):\n    return 2 * x")
    with Grader() as grader:
        with pytest.raises(RewardError, match=r"bubblewrap.*not installed\. Install it.*--unsafe-code-execution"):
            grader.require({"math", "code"})
        with pytest.raises(RewardError, match="--unsafe-code-execution"):
            grader.grade([Answer(grader="code", gold="assert f(2) == 4", text=program)])
        grader.require({"math", "exact", "choice"})
    assert not canary.exists()


def test_a_sandbox_that_cannot_start_is_refused_with_its_words(monkeypatch, tmp_path):
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(broken))
    with Grader() as grader, pytest.raises(RewardError, match=r"cannot start here .*No permissions to create"):
        grader.require({"code"})


def test_unsafe_is_asked_for_and_then_runs_without(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with Grader(unsafe_code=True) as grader:
        items = [Answer(grader="code", gold="assert f(2) == 4", text=fenced(p)) for p in (DOUBLE, "def f(x): return 5")]
        assert grader.grade(items) == [C, W]
        assert not grader._sandbox.confined


@needs_sandbox
def test_unsafe_still_uses_the_sandbox_where_there_is_one():
    with Grader(unsafe_code=True) as grader:
        grader.require({"code"})
        assert grader._sandbox.confined


def test_the_grader_counts_caches_and_keeps_order(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with Grader(unsafe_code=True, workers=2) as grader:
        texts = [fenced(DOUBLE), "no program", fenced("def f(x): return 5"), fenced(DOUBLE), fenced("x" * 300_000)]
        items = [Answer(grader="code", gold="assert f(2) == 4", text=text) for text in texts]
        assert grader.grade(items) == [C, W, W, C, E]
        assert grader.grade(items[:3]) == [C, W, W]
        assert dict(grader.paths) == {"exact": 3, "worker": 2, "cache": 3}


def test_nothing_of_a_program_is_run_by_the_graders_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", None)  # without processes nothing can run at all
    assert isinstance(decide("assert f(2) == 4", fenced("open('canary', 'w')")), Task)
    assert list(tmp_path.iterdir()) == []
