"""Verdicts on responses: exact rules first, worker processes for what they cannot decide, a sandbox for programs."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType, TracebackType

from mifo.data.extract import after_thought, gold_answer, gsm8k_answer, last_boxed, response_answer
from mifo.errors import RewardError
from mifo.rewards import choice, code, exact, label, math
from mifo.rewards.pool import WorkerPool
from mifo.rewards.sandbox import Sandbox
from mifo.types import GraderName, Verdict

_CACHE_ENTRIES = 50_000
Open = math.Comparison | code.Task  # what other processes must decide


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One response to grade: `text` is the whole response, `gold` the reference answer, `grader` the rule."""

    grader: GraderName
    gold: str
    text: str


class Grader:
    """Grades responses; a context manager that ends its worker processes on exit.

    A verdict is CORRECT or WRONG where that was decided, TIMEOUT where a comparison took too long, and ERROR where it
    failed: the worker ran out of memory or died, the library raised, the gold is no expression it can read, or gold
    or answer is longer than `math.MAX_CHARS` characters; `code` says what they mean for programs. Threads may share a
    grader; they wait for each other.

    Args:
        workers: processes for mathematical answers that exact comparison cannot decide, started when first needed, and
            programs that run at once.
        seconds_per_answer: wall-clock deadline of one answer in a worker or sandbox.
        memory_mib: address space of a worker or program.
        unsafe_code: run programs without a sandbox where there can be none.
    """

    def __init__(
        self,
        *,
        workers: int = 1,
        seconds_per_answer: float = 5.0,
        memory_mib: int = 2048,
        unsafe_code: bool = False,
    ):
        self._workers = workers
        self._sandbox = Sandbox(seconds_per_answer=seconds_per_answer, memory_mib=memory_mib, unsafe=unsafe_code)
        self._pool = WorkerPool(workers=workers, seconds_per_answer=seconds_per_answer, memory_mib=memory_mib)
        self._lock = threading.Lock()
        self._known: dict[math.Comparison | str, Verdict] = {}  # a program by its key
        self._counts = dict.fromkeys(Verdict, 0)
        self._paths = {"exact": 0, "worker": 0, "cache": 0}
        self._end = weakref.finalize(self, self._pool.close)  # also when the interpreter exits without close()

    @property
    def counts(self) -> Mapping[Verdict, int]:
        """Verdicts given so far, one an answer."""
        return MappingProxyType(self._counts)

    @property
    def paths(self) -> Mapping[str, int]:
        """Answers decided so far by exact rules, by another process, and by what such a process had said before."""
        return MappingProxyType(self._paths)

    def require(self, graders: Collection[GraderName]) -> None:
        """Raises RewardError when answers of one of these graders cannot be graded on this machine."""
        if "code" in graders:
            self._sandbox.require()

    def grade(self, items: Sequence[Answer]) -> list[Verdict]:
        """Verdicts in the order of `items`.

        Raises RewardError for an empty gold, a choice gold that is no letter, tests that cannot be read, an unknown
        grader, when no worker starts, and for a program where there is no sandbox.
        """
        with self._lock:
            outcomes = [_decide(item) for item in items]
            answers = self._compare(outcomes)
            verdicts = [o if isinstance(o, Verdict) else answers[_key(o)] for o in outcomes]
            for verdict in verdicts:
                self._counts[verdict] += 1
            return verdicts

    def _compare(self, outcomes: Sequence[Verdict | Open]) -> dict[math.Comparison | str, Verdict]:
        """Verdicts on what is open, by key: known ones, and new ones asked for once each, in order."""
        wanted = {_key(o): o for o in outcomes if not isinstance(o, Verdict)}
        asked = {key: o for key, o in wanted.items() if key not in self._known}
        comparisons = [o for o in asked.values() if isinstance(o, math.Comparison)]
        tasks = [o for o in asked.values() if isinstance(o, code.Task)]
        answers: dict[math.Comparison | str, Verdict] = {}
        if comparisons:
            answers.update(zip(comparisons, self._pool.run(comparisons), strict=True))
        if tasks:
            answers.update(zip(map(_key, tasks), self._run_programs(tasks), strict=True))
        exact_ones = sum(isinstance(o, Verdict) for o in outcomes)
        self._paths["worker"] += len(asked)
        self._paths["cache"] += len(outcomes) - exact_ones - len(asked)
        self._paths["exact"] += exact_ones
        answers = {key: self._known.get(key) or answers[key] for key in wanted}
        self._remember(answers)
        return answers

    def _run_programs(self, tasks: Sequence[code.Task]) -> list[Verdict]:
        self._sandbox.require()
        with ThreadPoolExecutor(self._workers) as threads:  # each only waits for the processes it started
            return [found.verdict for found in threads.map(self._sandbox.judge, [task.job for task in tasks])]

    def _remember(self, answers: Mapping[math.Comparison | str, Verdict]) -> None:
        for key, verdict in answers.items():
            if verdict in (Verdict.CORRECT, Verdict.WRONG):  # others may be the machine's, not the answer's
                self._known[key] = verdict
        while len(self._known) > _CACHE_ENTRIES:
            del self._known[next(iter(self._known))]

    def warm_up(self) -> None:
        """Starts a worker process without waiting for it, so that the first answer that needs one finds the libraries loaded."""
        with self._lock:
            self._pool.start_ahead()

    def close(self) -> None:
        """Ends the workers. Grading again afterwards starts new ones."""
        with self._lock:
            self._pool.close()

    def __enter__(self) -> Grader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _key(outcome: Open) -> math.Comparison | str:
    return outcome.key if isinstance(outcome, code.Task) else outcome


def _decide(item: Answer) -> Verdict | Open:
    if not item.gold.strip():
        raise RewardError(
            f"answer = {item.gold!r}: the reference answer is empty, so nothing could be correct; give the "
            "problem an answer or drop it"
        )
    if item.grader == "math":
        answer = response_answer(item.text)
        return Verdict.WRONG if answer is None else math.decide(gold_answer(item.gold), answer)
    if item.grader == "exact":
        return exact.decide(item.gold, item.text)
    if item.grader == "choice":
        return choice.decide(item.gold, item.text)
    if item.grader == "code":
        return code.decide(item.gold, item.text)
    if item.grader == "label":
        return label.decide(item.gold, item.text)
    raise RewardError(
        f"grader = {item.grader!r}: there is no such grader; use 'math', 'exact', 'choice', 'code' or 'label'"
    )


def verify_demonstration(grader: Grader, problem_grader: GraderName, gold: str, demonstration: str) -> Verdict:
    r"""The verdict on a written solution, which may end in a box or, as GSM8K has it, in `#### 18`.

    Graded as a response is, by the grader of its problem. Raises what `Grader.grade` raises.
    """
    visible = after_thought(demonstration)
    marked = gsm8k_answer(visible) if last_boxed(visible) is None else None
    text = visible if marked is None else f"\\boxed{{{marked}}}"
    return grader.grade([Answer(grader=problem_grader, gold=gold, text=text)])[0]
