"""Settings that cannot work together: each is refused with the fields, their values and a remedy."""

import pytest

from mifo.config.check import check_config
from mifo.config.decode import decode
from mifo.config.schema import Config
from mifo.errors import ConfigError


def rl(**settings):
    return {"method": {"name": "grpo", "rl": settings}}


def mifo(**settings):
    return {"method": {"name": "mifo", **settings}}


CASES = [
    (
        {"rl_optimizer": {"schedule": "cosine"}},
        ["rl_optimizer.schedule = 'cosine'", "needs rl_optimizer.decay_updates"],
    ),
    (
        {"sft_optimizer": {"schedule": "linear", "warmup_updates": 5, "decay_updates": 5}},
        ["sft_optimizer.decay_updates = 5", "must exceed", "warmup_updates = 5"],
    ),
    ({"reward": {"correct": 0.0}}, ["reward.correct = 0", "reward.incorrect = 0", "The usual values are 1 and 0"]),
    (
        {"data": {"evaluation": "none"}, "evaluation": {"every_steps": 5}},
        ["evaluation.every_steps = 5", "data.evaluation = 'none'", "Name held-out problems"],
    ),
    (
        {"evaluation": {"meter_problems": 5, "around_sft": False}},
        ["evaluation.meter_problems = 5", "evaluation.around_sft = false", "Leave one of them out"],
    ),
    (
        {"evaluation": {"samples": 4}},
        ["evaluation.samples = 4", "evaluation.temperature = 0", "Use 1 sample, or a temperature"],
    ),
    ({"model": {"path": "tiny", "revision": "v1"}}, ["model.revision = 'v1'", "model.path = 'tiny'", "Leave it out"]),
    ({"model": {"path": "tiny", "context": 512}}, ["model.context = 512", "model.path = 'tiny'", "Leave it out"]),
    ({"model": {"path": "tiny", "rope_theta": 4e4}}, ["model.rope_theta = 40000", "model.path = 'tiny'"]),
    ({"rl_optimizer": {"minimum_ratio": 0.0}}, ["rl_optimizer.minimum_ratio = 0", "schedule = 'constant'"]),
    ({"evaluation": {"meter_problems": 300}}, ["evaluation.meter_problems = 300", "data.evaluation_problems = 200"]),
    ({"data": {"verify_demonstrations": False}}, ["data.verify_demonstrations = false", "Leave it true"]),
    ({"data": {"box_answers": True}}, ["data.box_answers = true", "Leave it false"]),
    (rl(rollouts_per_prompt=1), ["method.rl.rollouts_per_prompt = 1", "Use at least 2"]),
    (
        rl(prompts_per_step=10, updates_per_step=3),
        ["method.rl.prompts_per_step = 10", "method.rl.updates_per_step = 3", "Choose a divisor"],
    ),
    (rl(constant_tokens=100), ["method.rl.constant_tokens = 100", "method.rl.normalizer = 'token'", "leave"]),
    (rl(clip_low=1.0), ["method.rl.clip_low = 1", "must be below 1"]),
    (rl(dual_clip=1.0), ["method.rl.dual_clip = 1", "must exceed 1"]),
    (
        {**rl(importance_cap=2.0), "rollout": {"temperature": 0.6}},
        ["method.rl.importance_cap = 2", "rollout.temperature = 0.6", "rollout.top_p = 1", "Use 1 for both"],
    ),
    ({"train": {"micro_batch_tokens": 1}}, ["train.micro_batch_tokens = 1", "Use at least a few hundred"]),
    (mifo(sft={"constant_tokens": 9}), ["method.sft.constant_tokens = 9", "method.sft.normalizer = 'token'"]),
    (rl(advantage="rloo", advantage_std=True), ["method.rl.advantage_std = true", "method.rl.advantage = 'rloo'"]),
    (rl(clip="weight", dual_clip=3.0), ["method.rl.dual_clip = 3", "method.rl.clip = 'weight'", "Leave dual_clip out"]),
    (rl(overlong_penalty=0.5), ["method.rl.overlong_penalty = 0.5", "without method.rl.overlong_tokens", "Set it"]),
    (
        {**rl(overlong_tokens=64), "rollout": {"max_response_tokens": 64}},
        ["method.rl.overlong_tokens = 64", "rollout.max_response_tokens = 64", "every response"],
    ),
    (rl(dynamic_rounds=3), ["method.rl.dynamic_rounds = 3", "method.rl.dynamic_sampling = false", "Leave it out"]),
    (mifo(rl={"dynamic_prompts": 3}), ["method.rl.dynamic_prompts = 3", "method.rl.dynamic_sampling = false"]),
    (
        rl(dynamic_sampling=True, dynamic_prompts=12),
        ["method.rl.dynamic_prompts = 12", "120 questions", "method.rl.prompts_per_step = 128", "could never fill"],
    ),
    (mifo(sft={"gem_beta": 0.5}), ["method.sft.gem_beta = 0.5", "loss = 'cross_entropy'", "set the loss to 'gem'"]),
    (mifo(sft={"loss": "dft", "asft_kl": 0.1}), ["method.sft.asft_kl = 0.1", "method.sft.loss = 'dft'", "'asft'"]),
    (mifo(sft={"loss": "psft"}), ["method.sft.loss = 'psft'", "method.sft.updates_per_batch = 1", "several updates"]),
    (
        {"method": {"name": "sft", "batch_size": 4, "sft": {"updates_per_batch": 5}}},
        ["method.sft.updates_per_batch = 5", "4 demonstrations", "Lower it"],
    ),
    (mifo(sft_batch_size=65), ["method.sft_batch_size = 65", "method.buffer_size = 64", "Lower it, or use none"]),
    (mifo(buffer_order="lifo"), ["method.buffer_order = 'lifo'", "method.sft_batch_size = none", "Set sft_batch_size"]),
    (mifo(token_denominator="kept", token_fraction=1.0), ["method.token_denominator = 'kept'", "Use 'all'"]),
    (mifo(fill_ties=True, freeze_top=0.0), ["method.fill_ties = true", "method.freeze_top = 0", "Leave it false"]),
    (
        {**mifo(optimizers="shared"), "sft_optimizer": {"learning_rate": 1e-5}},
        ["method.optimizers = 'shared'", "sft_optimizer", "or use 'separate'"],
    ),
]


@pytest.mark.parametrize(("tables", "words"), CASES)
def test_refused(tables, words):
    with pytest.raises(ConfigError) as caught:
        check_config(decode(Config, tables))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "tables",
    [
        {},
        {"rl_optimizer": {"schedule": "cosine", "warmup_updates": 4, "decay_updates": 5}},
        {"reward": {"correct": 1.0, "incorrect": -1.0}},
        {"evaluation": {"samples": 4, "temperature": 0.6}},
        {
            "data": {"train": "a.jsonl", "evaluation": "b.jsonl", "families": ["gcd"], "levels": 1}
        },  # own data with a recipe
        {"data": {"train": "a.jsonl", "evaluation": "none", "box_answers": True, "verify_demonstrations": False}},
        rl(constant_tokens=100, normalizer="constant"),
        rl(rollouts_per_prompt=2, prompts_per_step=9, updates_per_step=3, clip_low=None, dual_clip=3.0),
        rl(importance_cap=2.0),
        mifo(sft_batch_size=64, buffer_order="lifo"),
        mifo(optimizers="shared"),
        mifo(token_fraction=1.0, freeze_top=0.0),
        rl(advantage="rloo", clip="weight"),
        rl(overlong_tokens=64, overlong_penalty=0.5),
        rl(dynamic_sampling=True, dynamic_prompts=13, dynamic_rounds=10),
        mifo(sft={"loss": "gem", "gem_beta": 0.5, "gem_weight": "linear"}),
        mifo(sft={"loss": "psft", "updates_per_batch": 64, "psft_clip": 0.1}),
        mifo(sft={"loss": "asft", "asft_kl": 0.1}),
        mifo(sft={"loss": "eaft", "eaft_alpha": 2.0}),
        {"method": {"name": "sft", "sft": {"normalizer": "constant", "constant_tokens": 9}}},
    ],
)
def test_the_nearest_good_settings_pass(tables):
    check_config(decode(Config, tables))
