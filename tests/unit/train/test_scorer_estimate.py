"""A dry run counts the second model: its memory, its share of checkpoints, its time."""

import pytest

from mifo.config.decode import decode
from mifo.config.schema import Config
from mifo.train import estimate as estimating
from mifo.train.build import make_grader, prepare

RL = {"prompts_per_step": 4, "rollouts_per_prompt": 2, "updates_per_step": 1, "entropy_coefficient": 0.0}


@pytest.fixture
def estimated(monkeypatch):
    monkeypatch.setattr(estimating, "_measured_flops", lambda device, dtype: 1e9)

    def of(method, **rl):
        data = {"families": ["tiny"], "train_problems": 20, "evaluation": "none"}
        tables = {"model": {"path": "tiny"}, "data": data, "rollout": {"max_response_tokens": 12}}
        config = decode(Config, {**tables, "method": {"name": method, "rl": RL | rl}})
        with make_grader(config) as grader:
            prepared = prepare(config, grader)
        return estimating.estimate(config, prepared.methods, prepared.corpus)

    return of


def test_a_critic_costs_a_model_with_gradients_and_moments(estimated):
    plain, ppo = estimated("grpo"), estimated("ppo")
    added = {name: ppo.memory[name] - size for name, size in plain.memory.items() if ppo.memory[name] != size}
    assert added == {
        "critic or reward model, gradients, moments": 16 * plain.parameters,
        "copy for the checkpoint writer": 12 * plain.parameters,
    }


def test_a_reward_model_costs_a_reference_too(estimated):
    plain, prime = estimated("grpo"), estimated("prime")
    assert prime.memory["reference model"] == 4 * plain.parameters
    assert prime.total_bytes - plain.total_bytes == (16 + 12 + 4) * plain.parameters


def test_time_counts_scoring_and_learning(estimated):
    """Trained tokens cost 6 N of the policy; 2 + 6 of a critic; 2 + 2 + 6 of a reward model with its reference."""
    plain, ppo, prime = estimated("grpo"), estimated("ppo"), estimated("prime")
    per_unit = (ppo.seconds_per_step - plain.seconds_per_step) / 8
    assert per_unit > 0
    assert prime.seconds_per_step - plain.seconds_per_step == pytest.approx(10 * per_unit)
    assert plain.seconds_per_step > 6 * per_unit
