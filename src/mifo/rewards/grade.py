"""Verdicts on responses: exact rules first, and worker processes for what they cannot decide."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, TracebackType

from mifo.data.extract import after_thought, gold_answer, gsm8k_answer, last_boxed, response_answer
from mifo.errors import RewardError
from mifo.rewards import choice, exact, math
from mifo.rewards.pool import WorkerPool
from mifo.types import GraderName, Verdict

_CACHE_ENTRIES = 50_000


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
    or answer is longer than `math.MAX_CHARS` characters. Threads may share a grader; they wait for each other.

    Args:
        workers: processes for mathematical answers that exact comparison cannot decide; started when first needed.
        seconds_per_answer: wall-clock deadline of one answer in a worker.
        memory_mib: address space of a worker.
    """

    def __init__(self, *, workers: int = 1, seconds_per_answer: float = 5.0, memory_mib: int = 2048):
        self._pool = WorkerPool(workers=workers, seconds_per_answer=seconds_per_answer, memory_mib=memory_mib)
        self._lock = threading.Lock()
        self._known: dict[math.Comparison, Verdict] = {}
        self._counts = dict.fromkeys(Verdict, 0)
        self._paths = {"exact": 0, "worker": 0, "cache": 0}
        self._end = weakref.finalize(self, self._pool.close)  # also when the interpreter exits without close()

    @property
    def counts(self) -> Mapping[Verdict, int]:
        """Verdicts given so far, one an answer."""
        return MappingProxyType(self._counts)

    @property
    def paths(self) -> Mapping[str, int]:
        """Answers decided so far by exact rules, by a worker, and by what a worker had said before."""
        return MappingProxyType(self._paths)

    def grade(self, items: Sequence[Answer]) -> list[Verdict]:
        """Verdicts in the order of `items`.

        Raises RewardError for an empty gold, a choice gold that is no letter, an unknown grader, and when no worker
        starts.
        """
        with self._lock:
            outcomes = [_decide(item) for item in items]
            answers = self._compare({o for o in outcomes if isinstance(o, math.Comparison)}, outcomes)
            verdicts = [answers[o] if isinstance(o, math.Comparison) else o for o in outcomes]
            for verdict in verdicts:
                self._counts[verdict] += 1
            return verdicts

    def _compare(
        self, wanted: set[math.Comparison], outcomes: Sequence[Verdict | math.Comparison]
    ) -> dict[math.Comparison, Verdict]:
        asked = list(
            dict.fromkeys(o for o in outcomes if o in wanted and o not in self._known)
        )  # in order of the items
        answers = dict(zip(asked, self._pool.run(asked), strict=True)) if asked else {}
        self._paths["worker"] += len(asked)
        self._paths["cache"] += sum(o in wanted for o in outcomes) - len(asked)
        self._paths["exact"] += sum(o not in wanted for o in outcomes)
        answers = {c: self._known.get(c) or answers[c] for c in wanted}
        self._remember(answers)
        return answers

    def _remember(self, answers: Mapping[math.Comparison, Verdict]) -> None:
        for comparison, verdict in answers.items():
            if verdict in (
                Verdict.CORRECT,
                Verdict.WRONG,
            ):  # an error or a time-out may be the machine's, not the answer's
                self._known[comparison] = verdict
        while len(self._known) > _CACHE_ENTRIES:
            del self._known[next(iter(self._known))]

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


def _decide(item: Answer) -> Verdict | math.Comparison:
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
    raise RewardError(f"grader = {item.grader!r}: there is no such grader; use 'math', 'exact' or 'choice'")


def verify_demonstration(grader: Grader, problem_grader: GraderName, gold: str, demonstration: str) -> Verdict:
    r"""The verdict on a written solution, which may end in a box or, as GSM8K has it, in `#### 18`.

    Graded as a response is, by the grader of its problem. Raises what `Grader.grade` raises.
    """
    visible = after_thought(demonstration)
    marked = gsm8k_answer(visible) if last_boxed(visible) is None else None
    text = visible if marked is None else f"\\boxed{{{marked}}}"
    return grader.grade([Answer(grader=problem_grader, gold=gold, text=text)])[0]
