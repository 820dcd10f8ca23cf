"""What a rollout earns: its verdict's reward, or that of responses that were cut off."""

from types import SimpleNamespace

import pytest

from mifo.config.schema import RewardConfig
from mifo.train.collect import make_group
from mifo.types import Message, Problem, Rollout, Verdict

CUT, DONE = "length", "stop"
ROLLOUTS = [(Verdict.CORRECT, DONE), (Verdict.CORRECT, CUT), (Verdict.WRONG, DONE), (Verdict.TIMEOUT, CUT)]


def rewards(**settings):
    parts = SimpleNamespace(
        config=SimpleNamespace(reward=RewardConfig(**settings)),
        corpus=SimpleNamespace(encoded={"a": SimpleNamespace(prompt_ids=(1,), demonstration_ids=None)}),
    )
    problem = Problem(id="a", messages=(Message("user", "?"),), answer="1")
    made = [Rollout(token_ids=(5,), logprobs=(-1.0,), stop=stop, weight_version=0) for _, stop in ROLLOUTS]
    group = make_group(parts, problem, made, [verdict for verdict, _ in ROLLOUTS])
    assert group.accuracy == 0.5  # by verdict, whatever is earned
    return group.rewards


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (1.0, 1.0, 0.0, 0.0)),
        ({"truncated": 0.0}, (1.0, 0.0, 0.0, 0.0)),
        ({"incorrect": -1.0, "truncated": -0.5}, (1.0, -0.5, -1.0, -0.5)),
    ],
)
def test_truncated_responses_have_a_reward_of_their_own_where_one_is_given(settings, expected):
    assert rewards(**settings) == expected
