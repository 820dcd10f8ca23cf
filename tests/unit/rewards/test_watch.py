"""Errors and time-outs stop a run above a share of a window; missing and non-finite rewards always do."""

import json

import pytest

from mifo.errors import RewardError
from mifo.rewards import Answer, FailureWatch, check_rewards
from mifo.types import Verdict

GOOD, WRONG, ERROR, TIMEOUT = Verdict.CORRECT, Verdict.WRONG, Verdict.ERROR, Verdict.TIMEOUT


def answers(count):
    return [Answer(grader="math", gold=f"gold {i}", text="x" * 500 + f" ends here {i}") for i in range(count)]


def see(watch, verdicts):
    watch.see(answers(len(verdicts)), verdicts)


def test_one_undecided_answer_in_a_small_step_stops_nothing():
    watch = FailureWatch(max_share=0.25, window=8)
    see(watch, [TIMEOUT])
    see(watch, [ERROR])
    with pytest.raises(RewardError, match="38%"):
        see(watch, [ERROR])


def test_old_failures_are_forgotten_and_the_share_itself_is_allowed():
    watch = FailureWatch(max_share=0.5, window=4)
    for _ in range(50):
        see(watch, [ERROR, GOOD, TIMEOUT, WRONG])
    with pytest.raises(RewardError):
        see(watch, [ERROR, ERROR, TIMEOUT])  # with the wrong one before them, 3 of 4


def test_wrong_answers_are_no_failures():
    watch = FailureWatch(max_share=0.01, window=100)
    see(watch, [WRONG] * 1000)
    with pytest.raises(RewardError):
        see(watch, [ERROR] * 2)


def test_a_share_of_one_never_stops():
    watch = FailureWatch(max_share=1.0, window=4)
    see(watch, [ERROR] * 100)
    with pytest.raises(RewardError):
        see(FailureWatch(max_share=0.99, window=4), [ERROR] * 100)


def test_the_window_survives_a_resume():
    before, after = (FailureWatch(max_share=0.5, window=4) for _ in range(2))
    see(before, [ERROR, GOOD, WRONG, TIMEOUT, GOOD])
    after.load_state_dict(json.loads(json.dumps(before.state_dict())))
    assert after.state_dict() == before.state_dict()
    for watch in (before, after):
        see(watch, [ERROR])  # WRONG, TIMEOUT, GOOD, ERROR: the share itself
        with pytest.raises(RewardError, match="75%"):
            see(watch, [ERROR])  # TIMEOUT, GOOD, ERROR, ERROR
    see(FailureWatch(max_share=0.5, window=4), [ERROR, ERROR])  # an empty window would let it pass


def test_a_shorter_window_keeps_the_newest_and_a_stop_says_that_it_has_no_example():
    watch = FailureWatch(max_share=0.5, window=8)
    see(watch, [ERROR, ERROR, GOOD, TIMEOUT, TIMEOUT, GOOD])
    shorter = FailureWatch(max_share=0.25, window=4)
    shorter.load_state_dict(watch.state_dict())
    with pytest.raises(RewardError, match=r"50% of the last 4.*The latest: none since the run was resumed"):
        see(shorter, [GOOD])


def test_the_message_names_fields_values_counts_and_examples():
    watch = FailureWatch(max_share=0.25, window=4)
    with pytest.raises(RewardError) as caught:
        see(watch, [GOOD, ERROR, TIMEOUT, TIMEOUT])
    text = str(caught.value)
    for part in (
        "reward.max_failure_share = 0.25",
        "75% of the last 4 answers",
        "reward.failure_window",
        "1 errors, 2 time-outs",
        "error: math grader, answer = 'gold 1'",
        "ends here 3",
        "reward.seconds_per_answer",
    ):
        assert part in text
    assert len(text) < 1500


@pytest.mark.parametrize("verdicts", [[], [GOOD], [GOOD, None], [GOOD, "correct", GOOD], [GOOD, float("nan")]])
def test_missing_verdicts_are_an_error(verdicts):
    with pytest.raises(RewardError, match="no verdict"):
        FailureWatch(max_share=1.0, window=4).see(answers(2), verdicts)


@pytest.mark.parametrize("reward", [None, "1", [1.0]])
def test_a_reward_that_is_no_number_is_an_error(reward):
    check_rewards([1.0, 0, -3, float("nan")], "p1")  # NaN skips a step, with the rollout named
    with pytest.raises(RewardError, match="problem 'p1'"):
        check_rewards([1.0, reward], "p1")
