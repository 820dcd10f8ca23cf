r"""The grader with its worker processes: verdicts of math-verify as corrected, and what hostile answers get."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from mifo.errors import RewardError
from mifo.rewards import Answer, Grader, template, verify_demonstration
from mifo.types import Verdict

LIMIT = 1.0


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=1, seconds_per_answer=20.0) as shared:
        yield shared


@pytest.fixture(scope="module")
def hasty():
    with Grader(workers=1, seconds_per_answer=LIMIT, memory_mib=1024) as shared:
        yield shared


def math(gold, answer):
    return Answer(grader="math", gold=gold, text=f"Therefore $\\boxed{{{answer}}}$.")


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] != "Z"


EQUAL = [
    ("9", "3^2"),
    ("9", "9=3^2"),
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"\sqrt{5}", r"\sqrt5"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt 2}"),
    ("(x+1)^2", "x^2+2x+1"),
    (r"\{1,2\}", r"\{2,1\}"),
    ("1,2", "2,1"),
    ("3.5", r"3\frac{1}{2}"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1 \\ 2\end{bmatrix}"),
    (r"(-\infty, 3)", "x<3"),
    ("[-2,7]", r"-2 \le x \le 7"),
    (r"[1,3) \cup (3,5]", r"(3,5] \cup [1,3)"),
    ("-2+7i", "7i-2"),
    (r"\binom{5}{2}", "10"),
    (r"\log_2 8", "3"),
    ("2x+4y-3=0", r"y = -\frac{1}{2}x + \frac{3}{4}"),
    (r"1-\frac{1}{\mathrm{e}}", r"\frac{e-1}{e}"),
    (r"5\pi\text{ cm}", r"5 \pi"),
    ("2ab", "2 a b"),
    (r"\frac{n(n+1)}{2}", r"\frac{n^2+n}{2}"),
]
DIFFERENT = [
    ("(1,2)", "[1,2]"),
    ("(1,2)", "(2,1)"),
    ("204", r"1,2,3,204"),
    ("204", "204=x"),
    ("3", r"3 \text{ or } 4"),
    ("204", r"203+0=204"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", "(1,2)"),
    (r"\frac{\pi}{2}", r"90^\circ"),
    ("10^{-20}", "0"),
    ("10^{-9}", r"2\cdot 10^{-9}"),
    (r"\frac{1}{2004!}", r"\frac{1}{2006!}"),
    (r"\frac{1}{2^{99}}", r"\frac{1}{2^{98}}"),
    (r"\frac{2^{2005}+1}{3 \cdot 2^{2006}}", r"\frac{1}{3 \cdot 2^{2006}}"),
    (r"(1, \frac{1}{2^{99}})", r"(1, \frac{1}{2^{98}})"),
    (r"\frac{x}{2^{99}}", r"\frac{x}{2^{98}}"),
    ("3.1415927", r"\pi"),
    ("e", "2.718281828"),
    (r"1 - \frac{1}{\mathrm{e}}", r"1 + \frac{1}{\mathrm{e}}"),
    ("3x + 4y + 14=0", "3x-1y+13=0"),
    ("4", r"4\sqrt(2)"),
    (r"(0,9) \cup (9,36)", "(0,36)"),
    ("x^2 + 4", "x^2+4=0"),
    ("x", "y"),
    ("x=5", "y=5"),
    (r"\pm 2021", "2021"),
    ("5", "five"),
    ("5", r"\frac{}{"),
    ("5", "1, 2, \\ldots, 5"),
]


@pytest.mark.parametrize(("gold", "answer"), EQUAL)
def test_equal(grader, gold, answer):
    assert grader.grade([math(gold, answer)]) == [Verdict.CORRECT]


@pytest.mark.parametrize(("gold", "answer"), DIFFERENT)
def test_different(grader, gold, answer):
    assert grader.grade([math(gold, answer)]) == [Verdict.WRONG]


def test_a_gold_that_cannot_be_read_is_an_error_not_a_wrong_answer(grader):
    gold = r"1, 2, \ldots, n"
    assert grader.grade([math(gold, r"1, 3, \ldots, 2n-1"), math(gold, gold)]) == [Verdict.ERROR, Verdict.CORRECT]


def test_order_counts_paths_and_cache():
    with Grader(workers=2) as grader:
        items = [
            math("2^3", "8"),
            math("1", "1"),
            math("2^3", "8"),
            math("2^3", "9"),
            math("1", "2"),
            math("7+1", "2^3"),
        ]
        wanted = [Verdict.CORRECT, Verdict.CORRECT, Verdict.CORRECT, Verdict.WRONG, Verdict.WRONG, Verdict.CORRECT]
        assert grader.grade(items) == wanted
        assert grader.grade(items) == wanted
        assert dict(grader.counts) == {
            Verdict.CORRECT: 8,
            Verdict.WRONG: 4,
            Verdict.ERROR: 0,
            Verdict.TIMEOUT: 0,
        }
        assert dict(grader.paths) == {"exact": 4, "worker": 3, "cache": 5}


def test_no_worker_is_started_for_what_exact_rules_decide():
    with Grader() as grader:
        grader.grade([math("5", "5.0"), Answer(grader="choice", gold="C", text="ANSWER: C")])
        assert grader._pool.process_ids == ()


@pytest.mark.parametrize("gold", ["", "  "])
def test_an_empty_gold_is_the_users_error(grader, gold):
    with pytest.raises(RewardError, match="empty"):
        grader.grade([math(gold, "5")])


def test_an_unknown_grader_is_the_users_error(grader):
    with pytest.raises(RewardError, match="no such grader"):
        grader.grade([Answer(grader="vibes", gold="5", text="5")])


def test_demonstrations_end_in_a_box_or_in_a_gsm8k_mark(grader):
    assert verify_demonstration(grader, "math", "18", "9*2\n#### 18") is Verdict.CORRECT
    assert verify_demonstration(grader, "math", "18", r"so \boxed{18}") is Verdict.CORRECT
    assert verify_demonstration(grader, "math", "18", "\\boxed{17}\n#### 18") is Verdict.WRONG
    assert verify_demonstration(grader, "math", "18", "the answer is 18") is Verdict.WRONG
    assert verify_demonstration(grader, "choice", "C", "ANSWER: C") is Verdict.CORRECT


HANGS = [
    r"9^{9^{9^{9}}}",
    r"1000000000!",
    r"\dfrac{5^{\left(5^{\left(5^{\left(5^5\right)}\right)} - 4\right)} - 5}{16}",
    r"\binom{10^9}{5\cdot 10^8}",
]


@pytest.mark.parametrize("answer", HANGS)
def test_a_hang_costs_the_limit_and_the_next_answer_is_graded(hasty, answer):
    fresh = f"z+{abs(hash(answer))}"  # not in the cache, so that a worker is up: its start is not counted
    assert hasty.grade([math(fresh, f"{fresh[2:]}+z")]) == [Verdict.CORRECT]
    start = time.monotonic()
    (verdict,) = hasty.grade([math("5", answer)])
    assert time.monotonic() - start < LIMIT + 1.0
    assert verdict is not Verdict.CORRECT
    assert hasty.grade([math("5+x", "x+5")]) == [Verdict.CORRECT]


def test_a_power_tower_is_a_timeout_not_a_wrong_answer(hasty):
    before = hasty.counts[Verdict.TIMEOUT]
    assert hasty.grade([math("5", HANGS[0] + "+1")]) == [Verdict.TIMEOUT]
    assert hasty.counts[Verdict.TIMEOUT] == before + 1


def test_deep_nesting_is_an_error_and_spares_the_next(hasty):
    deep = r"\sqrt{2+" * 60 + "2" + "}" * 60
    verdicts = hasty.grade([math("5", deep), math("6+x", "x+6")])
    assert verdicts[0] in (Verdict.ERROR, Verdict.TIMEOUT)
    assert verdicts[1] is Verdict.CORRECT


def _kill_when_busy(grader, *, busy):
    def strike():
        while not any((w.task is not None) == busy and w.ready for w in grader._pool._workers):
            time.sleep(0.01)
        for pid in grader._pool.process_ids:
            os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=strike)
    thread.start()
    return thread


def test_a_worker_killed_at_work_is_an_error_and_is_replaced():
    with Grader(seconds_per_answer=30.0) as grader:
        thread = _kill_when_busy(grader, busy=True)
        assert grader.grade([math("5", HANGS[0]), math("2+x", "x+2")]) == [Verdict.ERROR, Verdict.CORRECT]
        thread.join()


def test_a_worker_killed_between_answers_costs_no_verdict():
    with Grader() as grader:
        assert grader.grade([math("3+x", "x+3")]) == [Verdict.CORRECT]
        (pid,) = grader._pool.process_ids
        thread = _kill_when_busy(grader, busy=False)
        thread.join()
        while alive(pid):
            time.sleep(0.01)
        assert grader.grade([math("4+x", "x+4")]) == [Verdict.CORRECT]


RAISES = "def equal(gold, parts): return bytearray(10 ** 10) is None"
SWALLOWS = """
def equal(gold, parts):  # as sympy does, which takes any exception for "cannot tell"
    kept = []
    try:
        while True:
            kept.append(bytearray(10 ** 7))
    except MemoryError:
        return False
"""


@pytest.mark.parametrize("bomb", [RAISES, SWALLOWS])
def test_running_out_of_memory_is_an_error_not_a_wrong_answer(monkeypatch, bomb):
    plant = f"import mifo.rewards.compare as c; exec({bomb!r}, c.__dict__); c.warm_up = lambda: None; from mifo"
    monkeypatch.setattr(template, "BOOT", template.BOOT.replace("from mifo", plant, 1))
    with Grader(memory_mib=1024, seconds_per_answer=30.0) as grader:
        assert grader.grade([math("5+x", "x+5"), math("6+x", "x+6")]) == [Verdict.ERROR, Verdict.ERROR]


def test_a_worker_that_cannot_start_says_why():
    with Grader(memory_mib=16) as grader, pytest.raises(RewardError, match="worker_memory_mib"):
        grader.grade([math("5+x", "x+5")])


def test_no_worker_is_left_after_close():
    grader = Grader(workers=2)
    grader.grade([math("5+x", "x+5"), math("6+x", "x+6")])
    pids = grader._pool.process_ids
    assert pids
    assert all(map(alive, pids))
    grader.close()
    assert not any(map(alive, pids))
    assert grader.grade([math("5+y", "y+5")]) == [Verdict.CORRECT]  # closed is not broken
    grader.close()


SCRIPT = """
    import os, signal, sys
    from mifo.rewards import Answer, Grader
    open(sys.argv[2], "a").write("run\\n")
    grader = Grader(seconds_per_answer=2.0)
    first = grader.grade([Answer(grader="math", gold="2^3", text=r"\\boxed{8}")])
    heavy = {"torch", "sympy", "math_verify", "latex2sympy2_extended"} & set(sys.modules)
    print(first[0].value, *grader._pool.process_ids, *heavy, flush=True)
    if sys.argv[1] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if sys.argv[1] == "kill busy":
        import threading
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
        grader.grade([Answer(grader="math", gold="5", text=r"\\boxed{9^{9^{9^{9}}}}")])
"""


@pytest.mark.parametrize("end", ["exit", "kill", "kill busy"])
def test_no_worker_outlives_its_parent_and_the_main_module_runs_once(tmp_path, end):
    script, marks = tmp_path / "user.py", tmp_path / "marks"  # no __main__ guard, as users write it
    script.write_text(textwrap.dedent(SCRIPT))
    done = subprocess.run(
        [sys.executable, script, end, marks], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    verdict, pid, *heavy = done.stdout.split()
    assert (verdict, heavy) == ("correct", [])  # nothing heavy was imported into the parent
    assert marks.read_text() == "run\n"
    until = time.monotonic() + 6.0
    while alive(int(pid)) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(int(pid))


def test_a_worker_ignores_modules_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "sympy.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)
    with Grader() as grader:
        assert grader.grade([math("5+x", "x+5")]) == [Verdict.CORRECT]
