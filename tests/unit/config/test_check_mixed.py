"""Settings of mixed methods that cannot work together are refused, with the remedy."""

import pytest

from mifo.config.check import check_config
from mifo.config.decode import decode
from mifo.config.schema import Config
from mifo.errors import ConfigError

CASES = [
    ({"method": {"name": "superrl", "gate": "log_sigma", "sigma_bound": 11.0}}, "method.sigma_bound"),
    ({"method": {"name": "sft_rl", "sft_steps": 500}}, "sft_steps = 500 leaves nothing of train.steps = 500"),
    ({"method": {"name": "rl_sft", "rl_steps": 600}}, "rl_steps = 600 leaves nothing"),
    ({"method": {"name": "multi_stage"}, "train": {"steps": 300}}, "Use a multiple of 250"),
    ({"method": {"name": "luffy"}, "data": {"train": "x.jsonl", "verify_demonstrations": False}}, "Leave it true"),
    ({"method": {"name": "srft"}, "data": {"train": "x.jsonl", "verify_demonstrations": False}}, "'srft', which gives"),
    ({"method": {"name": "rl_with_sft", "rl": {"rollouts_per_prompt": 2}}}, "Use at least 3"),
    ({"method": {"name": "luffy", "rl": {"rollouts_per_prompt": 1}}}, "Use at least 2"),
    ({"method": {"name": "srft", "updates_per_step": 3}}, "does not divide"),
    (
        {"method": {"name": "srft", "sft_scale": 0.0, "sft_entropy_sign": "plus"}},
        "has no effect with method.sft_scale = 0",
    ),
    (
        {"method": {"name": "superrl", "sigma_rate": 0.1}},
        "method.sigma_rate = 0.1 has no effect with method.gate = 'reward'",
    ),
    (
        {"method": {"name": "superrl", "gate": "log_sigma", "denominator": "stream"}},
        "method.denominator = stream has no effect",
    ),
    ({"method": {"name": "srft", "sft": {"normalizer": "sequence"}}}, "method.sft.normalizer = sequence has no effect"),
    (
        {"method": {"name": "srft", "sft": {"loss": "dft"}, "sft_scale": 0.0}},
        "method.sft has no effect with method.sft_scale = 0",
    ),
    ({"method": {"name": "srft", "sft": {"lora_rank": 4}}}, "adapters are trained in SFT phases of their own"),
    ({"method": {"name": "srft", "updates_per_step": 1, "sft": {"loss": "psft"}}}, "with method.updates_per_step = 1"),
    ({"method": {"name": "mifo", "sft": {"token_fraction": 0.5}}}, "whose own method.token_fraction says it"),
    ({"method": {"name": "superrl"}, "reward": {"correct": 0.0, "incorrect": -1.0}}, "method.gate = 'advantage'"),
    ({"method": {"name": "chord", "demonstrations_per_step": 63}}, "Choose a multiple"),
    ({"method": {"name": "chord", "mu_peak": 0.1, "mu_valley": 0.2}}, "Exchange them"),
    ({"method": {"name": "chord", "mu_decay_steps": 0}}, "leaves no step between them"),
    ({"method": {"name": "hpt", "sft": {"constant_tokens": 5}}}, "method.sft.constant_tokens"),
    ({"method": {"name": "hpt", "rl": {"dynamic_sampling": True}}}, "groups that it drops"),
    ({"method": {"name": "luffy", "rl": {"advantage": "rloo"}}}, "'luffy': the baseline"),
    ({"method": {"name": "luffy", "rl": {"overlong_tokens": 9}}}, "overlong_tokens = 9 with"),
    ({"method": {"name": "chord", "sft": {"updates_per_batch": 2}}}, "Use method.rl.updates_per_step"),
    ({"method": {"name": "sft_rl", "sft": {"updates_per_batch": 65}}}, "exceeds the 64 demonstrations"),
    ({"method": {"name": "relift", "rl": {"prompts_per_step": 3}}}, "equal updates"),
    ({"method": {"name": "hpt", "accuracy_threshold": 1.0}}, "method.accuracy_threshold"),
]


@pytest.mark.parametrize(("tables", "message"), CASES, ids=[message for _, message in CASES])
def test_refused(tables, message):
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        check_config(decode(Config, tables))


@pytest.mark.parametrize(
    "tables",
    [
        {"method": {"name": "sft_rl", "sft_steps": 499}},
        {"method": {"name": "multi_stage"}, "train": {"steps": 500}},
        {"method": {"name": "superrl", "gate": "advantage"}, "reward": {"correct": 0.0, "incorrect": -1.0}},
        {"method": {"name": "chord", "mu_decay_steps": 0, "mu_peak": 0.1, "mu_valley": 0.1}},
        {"method": {"name": "rl_with_sft", "rl": {"rollouts_per_prompt": 3}}},
    ],
)
def test_the_remedy_works(tables):
    check_config(decode(Config, tables))
