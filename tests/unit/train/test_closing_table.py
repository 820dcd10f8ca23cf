"""The table at the end of a run says what ended it, in words that fit the method."""

import io

import pytest
from rich.console import Console

from mifo.train.console import closing_table

SUMMARY = {
    "accuracy_before": 0.0,
    "accuracy_before_interval": [0.0, 0.02],
    "accuracy_after": 0.47,
    "accuracy_after_interval": [0.402, 0.539],
    "problems": 200,
    "response_length_before": 61.2,
    "response_length_after": 20.6,
    "steps": 21,
    "stages": [],
    "planned_steps": 60,
    "ended_by": "minutes",
    "rl_steps": 21,
    "sft_steps": 55,
    "intervals": 1,
    "sft_phases": [
        {
            "interval": 1,
            "before": 0.1,
            "after": 0.3,
            "change_interval": [0.05, 0.35],
            "frozen_fraction": 0.5,
            "demonstrations": 64,
        }
    ],
    "frozen_fraction": 0.5,
    "demonstrations_used": 439,
    "unique_demonstrations": 430,
    "seconds": 594.0,
}


def shown(**changes):
    out = io.StringIO()
    Console(file=out, width=120).print(closing_table(SUMMARY | changes))
    return out.getvalue()


def test_every_figure_is_in_it():
    text = shown()
    for part in (
        "0.0 % (95 %: 0.0 to 2.0) of 200 problems",
        "47.0 % (95 %: 40.2 to 53.9)",
        "61 → 21 tokens",
        "21 RL steps, 55 SFT steps, 1 intervals",
        "439 (430 different)",
        "50.0 % in the last SFT phase",
        "10.0 % before, 30.0 % after (+20.0, 95 %: +5.0 to +35.0)",
        "9:54",
    ):
        assert part in text, part


@pytest.mark.parametrize(("ended_by", "said"), [("minutes", True), ("steps", False)])
def test_it_says_when_time_ended_the_run(ended_by, said):
    assert ("21 of 60, when train.minutes was up" in shown(ended_by=ended_by)) is said


def test_a_run_without_evaluation_has_no_accuracy():
    text = shown(accuracy_before=None, accuracy_after=None, response_length_before=None, sft_phases=[])
    assert "accuracy" not in text
    assert "frozen" not in text
