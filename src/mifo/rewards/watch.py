"""A run whose grader fails too often is stopped: its rewards would teach the grader's failures.

Counted over the newest answers and divided by the length of the window, not by what was seen so far: one undecided answer
in a small step stops nothing, while a grader that fails on everything is noticed before the window is full. The window is state
of the run: one that is killed and resumed stops at the same step.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any

from mifo.errors import RewardError
from mifo.rewards.grade import Answer
from mifo.types import Verdict

FAILURES = (Verdict.ERROR, Verdict.TIMEOUT)
_EXAMPLES = 3
_SHOWN = 120  # characters of a text in the message


class FailureWatch:
    """Errors and time-outs among the newest `window` answers.

    Args:
        max_share: highest share of the window that may be undecided; 1 never stops.
        window: answers looked back upon.
    """

    def __init__(self, *, max_share: float, window: int):
        self._max_share = max_share
        self._window = window
        self._newest: deque[Verdict] = deque(maxlen=window)
        self._examples: deque[tuple[Answer, Verdict]] = deque(maxlen=_EXAMPLES)

    def see(self, answers: Sequence[Answer], verdicts: Sequence[Verdict]) -> None:
        """Counts one step. Raises RewardError above the share, and where an answer has no verdict."""
        if len(verdicts) != len(answers) or not all(isinstance(verdict, Verdict) for verdict in verdicts):
            raise RewardError(
                f"grading gave {len(verdicts)} verdicts on {len(answers)} answers, or something that is no verdict "
                f"({sorted({str(v) for v in verdicts})[:5]}): there is no reward to learn from. Use a grader that answers "
                "correct, wrong, error or timeout for each."
            )
        for answer, verdict in zip(answers, verdicts, strict=True):
            self._newest.append(verdict)
            if verdict in FAILURES:
                self._examples.append((answer, verdict))
        counts = Counter(verdict for verdict in self._newest if verdict in FAILURES)
        share = sum(counts.values()) / self._window
        if share > self._max_share:
            raise RewardError(self._message(share, counts))

    def _message(self, share: float, counts: Counter[Verdict]) -> str:
        examples = "; ".join(
            f"{verdict.value}: {answer.grader} grader, answer = {_short(answer.gold)}, response ends "
            f"{_short(answer.text, end=True)}"
            for answer, verdict in self._examples
        )
        examples = examples or "none since the run was resumed"
        return (
            f"reward.max_failure_share = {self._max_share:g}: grading failed on {share:.0%} of the last {self._window} answers "
            f"(reward.failure_window; {counts[Verdict.ERROR]} errors, {counts[Verdict.TIMEOUT]} time-outs). Such rewards say "
            f"nothing about the answers. The latest: {examples}. Mend or drop these problems, raise "
            "reward.seconds_per_answer (time-outs) or reward.worker_memory_mib (errors), or raise reward.max_failure_share "
            "if this many are to be expected."
        )

    def state_dict(self) -> dict[str, Any]:
        """The window as plain data, oldest first. The examples of the message are texts of the model and stay outside."""
        return {"newest": [verdict.value for verdict in self._newest]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; of a window that was longer, the newest."""
        self._newest.clear()
        self._newest.extend(Verdict(value) for value in state["newest"])


def _short(text: str, *, end: bool = False) -> str:
    if len(text) <= _SHOWN:
        return repr(text)
    return repr(f"...{text[-_SHOWN:]}" if end else f"{text[:_SHOWN]}...")


def check_rewards(rewards: Sequence[float], problem: str) -> None:
    """Raises RewardError for a reward that is no number; `problem` is the id to name. NaN and infinity skip a step instead."""
    for reward in rewards:
        if not isinstance(reward, (int, float)):
            raise RewardError(
                f"problem {problem!r} has the reward {reward!r}, which is no number, so no advantage can be made from it. "
                "Make every reward a finite number (reward.correct and reward.incorrect)."
            )
