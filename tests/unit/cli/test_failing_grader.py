"""A run whose grading fails ends with a message and status 2, never with status 0."""

import json

import pytest

from mifo.cli import main
from mifo.rewards import Grader
from mifo.types import Verdict


def train(tmp_path, *more):
    return main(
        ["train", "tiny", "--run.folder", str(tmp_path), "--train.steps", "3", "--data.evaluation", "none", *more]
    )


@pytest.fixture
def failing(monkeypatch):
    """Makes rollouts (graded many at a time) get what is given; demonstrations are graded as ever."""

    def install(outcome):
        original = Grader.grade
        monkeypatch.setattr(
            Grader, "grade", lambda self, items: original(self, items) if len(items) == 1 else outcome(items)
        )

    return install


def test_errors_above_the_share_stop_the_run(tmp_path, failing, capsys):
    failing(lambda items: [Verdict.ERROR] * len(items))
    assert train(tmp_path, "--reward.failure-window", "32") == 2
    message = capsys.readouterr().err
    for part in ("reward.max_failure_share = 0.25", "of the last 32 answers", "error: ", "reward.seconds_per_answer"):
        assert part in message
    assert "Traceback" not in message


def test_below_the_share_the_run_goes_on_and_the_rates_are_in_the_metrics(tmp_path, failing):
    failing(lambda items: [Verdict.TIMEOUT] + [Verdict.WRONG] * (len(items) - 1))
    assert train(tmp_path) == 0
    records = [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    sampled = [record for record in records if "verdicts" in record]
    assert sampled
    for record in sampled:
        assert record["grading_timeouts"] == 1 / sum(record["verdicts"].values())
        assert record["grading_errors"] == 0


@pytest.mark.parametrize(
    "outcome", [lambda items: [None] * len(items), lambda items: [Verdict.WRONG], lambda items: []]
)
def test_missing_verdicts_stop_the_run(tmp_path, failing, capsys, outcome):
    failing(outcome)
    assert train(tmp_path) == 2
    assert "no verdict" in capsys.readouterr().err


def test_a_reward_that_is_no_number_is_refused(tmp_path, capsys):
    assert train(tmp_path, "--reward.correct", "nan") == 2
    assert "reward.correct" in capsys.readouterr().err
