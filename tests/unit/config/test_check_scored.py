"""Settings of methods with a second model that cannot work together are refused, with the remedy."""

import pytest

from mifo.config.check import check_config
from mifo.config.decode import decode
from mifo.config.schema import Config
from mifo.errors import ConfigError


def ppo(rl=(), **settings):
    return {"method": {"name": "ppo", "rl": dict(rl), **settings}}


def prime(rl=(), **settings):
    return {"method": {"name": "prime", "rl": dict(rl), **settings}}


def around(name, scorer, rl=(), **settings):
    return {"method": {"name": name, "rl": dict(rl), "scorer": {"name": scorer, **settings}}}


CASES = [
    (around("sft_rl", "ppo", critic_warmup_steps=250), "leaves none of the 250 RL steps of train.steps = 500"),
    (
        {
            "method": {
                "name": "multi_stage",
                "rl_steps": 5,
                "sft_steps": 5,
                "scorer": {"name": "ppo", "critic_warmup_steps": 5},
            }
        },
        "leaves none of method.rl_steps = 5",
    ),
    (
        {"method": {"name": "rl_sft", "rl_steps": 3, "scorer": {"name": "ppo", "critic_warmup_steps": 4}}},
        "leaves none of method.rl_steps = 3",
    ),
    ({"critic_optimizer": {"learning_rate": 1e-4}}, "method.name = 'mifo' has no critic. Leave the table out"),
    (
        {"method": {"name": "grpo"}, "critic_optimizer": {"beta2": 0.9}},
        "give a method whose RL has steps of its own (mifo, relift, sft_rl, rl_sft, multi_stage) a [method.scorer] table",
    ),
    ({**ppo(), "prm_optimizer": {"beta2": 0.9}}, "method.name = 'ppo' has no process reward model. Leave"),
    ({**prime(), "critic_optimizer": {"beta2": 0.9}}, "method.name = 'prime' has no critic"),
    (ppo({"advantage": "rloo"}), "method.rl.advantage = 'rloo'"),
    (prime({"advantage_std": True}), "method.rl.advantage_std = true with method.name = 'prime'"),
    (ppo(critic_updates_per_step=1025), "method.critic_updates_per_step = 1025 exceeds the 1024 rollouts"),
    (prime(prm_updates_per_step=1025), "method.prm_updates_per_step = 1025 exceeds the 1024 rollouts"),
    (ppo(critic_warmup_steps=500), "leaves none of train.steps = 500 to the policy"),
    (ppo({"rollouts_per_prompt": 1, "dynamic_sampling": True}), "method.rl.rollouts_per_prompt = 1: a single response"),
    (prime({"rollouts_per_prompt": 1}), "Use at least 2"),
    (prime(least_accuracy=0.9), "method.least_accuracy = 0.9 exceeds method.most_accuracy = 0.8"),
    (prime({"rollouts_per_prompt": 2}, least_accuracy=0.6), "no number of right responses among"),
    (prime(dense_coefficient=0.0, dense_norm="none"), "method.dense_norm = 'none' has no effect"),
    (prime(dense_coefficient=0.0, dense_baseline="scaled"), "method.dense_baseline = 'scaled' has no effect"),
    (ppo(value_clip=0.0), "method.value_clip"),
    (ppo(gae_lambda=1.1), "method.gae_lambda"),
    (ppo(discount=0.0), "method.discount"),
    ({**ppo(), "critic_optimizer": {"schedule": "cosine"}}, "critic_optimizer.schedule = 'cosine' needs"),
    ({**prime(), "prm_optimizer": {"minimum_ratio": 0.5}}, "prm_optimizer.minimum_ratio = 0.5 has no effect"),
    (around("mifo", "ppo", {"advantage": "rloo"}), "with method.scorer.name = 'ppo', whose advantages are"),
    (around("relift", "ppo", critic_updates_per_step=1025), "method.scorer.critic_updates_per_step = 1025 exceeds"),
    (
        around("sft_rl", "ppo", critic_warmup_steps=500),
        "method.scorer.critic_warmup_steps = 500 leaves none of the 250 RL steps",
    ),
    (
        around("mifo", "prime", least_accuracy=0.9),
        "method.scorer.least_accuracy = 0.9 exceeds method.scorer.most_accuracy",
    ),
    (around("mifo", "prime", {"rollouts_per_prompt": 1}), "Use at least 2"),
    ({**around("mifo", "ppo"), "prm_optimizer": {"beta2": 0.9}}, "has no process reward model"),
    (
        {"stages": [{"method": {"name": "ppo"}}, {**around("mifo", "prime")}]},
        "ppo → mifo need a critic (ppo) and a process reward model (prime), but a run has one second model",
    ),
    ({"reward": {"truncated": 1.0}}, "reward.truncated = 1 must be below reward.correct = 1"),
    ({"reward": {"truncated": 0.0}, "method": {"name": "sft"}}, "reward.truncated = 0 has no effect"),
]


@pytest.mark.parametrize(("tables", "message"), CASES, ids=[message for _, message in CASES])
def test_refused(tables, message):
    with pytest.raises(ConfigError) as caught:
        check_config(decode(Config, tables))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "tables",
    [
        {**ppo(), "critic_optimizer": {"learning_rate": 1e-4}},
        {**prime(), "prm_optimizer": {"learning_rate": 1e-4}},
        ppo({"rollouts_per_prompt": 1}),
        ppo({"rollouts_per_prompt": 2, "dynamic_sampling": True}),
        ppo(critic_updates_per_step=1024, critic_warmup_steps=499, value_clip=None, gae_lambda=0.0),
        prime({"rollouts_per_prompt": 2}, least_accuracy=0.5, most_accuracy=0.5),
        prime(dense_coefficient=0.0),
        {**around("mifo", "ppo", {"rollouts_per_prompt": 1}), "critic_optimizer": {"learning_rate": 1e-4}},
        {**around("multi_stage", "prime"), "prm_optimizer": {"learning_rate": 1e-4}},
        {"stages": [{"method": {"name": "sft"}}, {"method": {"name": "ppo"}}], "critic_optimizer": {"beta2": 0.9}},
        {"reward": {"correct": 1.0, "incorrect": -1.0, "truncated": -2.0}},
        {"reward": {"truncated": 0.0}},
    ],
)
def test_the_nearest_good_settings_pass(tables):
    check_config(decode(Config, tables))


def test_each_table_has_its_own_defaults_also_where_some_are_given():
    config = decode(Config, {"critic_optimizer": {"beta2": 0.9}, "prm_optimizer": {"beta2": 0.9}})
    assert (config.critic_optimizer.learning_rate, config.critic_optimizer.clip_norm) == (1e-5, 1.0)
    assert (config.prm_optimizer.learning_rate, config.prm_optimizer.clip_norm) == (1e-6, 10.0)
