"""Graders: a verdict on a response, decided or reported as undecided, never guessed (DESIGN 2).

Importing this package, and grading with it, loads neither torch nor sympy nor math-verify into the process: what needs
a mathematics library runs in worker processes (`pool`).
"""

from mifo.rewards.grade import Answer, Grader, verify_demonstration
from mifo.rewards.watch import FailureWatch, check_rewards

__all__ = ["Answer", "FailureWatch", "Grader", "check_rewards", "verify_demonstration"]
