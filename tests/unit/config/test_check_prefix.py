"""Settings of methods that continue demonstrations, and of SASR, that cannot work together are refused, with the remedy."""

import pytest

from mifo.config.check import check_config
from mifo.config.decode import decode
from mifo.config.schema import Config
from mifo.errors import ConfigError

UFT, PREFIX, BREAD, SASR = ({"name": name} for name in ("uft", "prefix_rft", "bread", "sasr"))
CASES = [
    ({"method": UFT | {"rl": {"dynamic_sampling": True}}}, "'uft': groups that it drops"),
    ({"method": BREAD | {"rl": {"dynamic_sampling": True}}}, "'bread': groups that it drops"),
    ({"method": PREFIX, "rollout": {"max_response_tokens": 1}}, "leaves no room for a demonstration's first token"),
    ({"method": UFT | {"sft": {"updates_per_batch": 2}}}, "Use method.rl.updates_per_step"),
    ({"method": UFT | {"hint_coefficient": 0.0, "sft": {"loss": "dft"}}}, "method.sft has no effect"),
    (
        {"method": UFT | {"hints": "stage", "hint_high": 0.5}},
        "hint_high = 0.5 has no effect with method.hints = 'stage'",
    ),
    ({"method": UFT | {"hints": "uniform", "hint_steps": 9}}, "hint_steps = 9 has no effect"),
    ({"method": UFT | {"hints": "stage", "hint_steps": 5}}, "Use at least 6"),
    ({"method": UFT | {"hint_high": 0.1, "hint_low": 0.2}}, "hints become shorter"),
    ({"method": UFT | {"rl": {"updates_per_step": 1}, "sft": {"loss": "psft"}}}, "with method.rl.updates_per_step = 1"),
    ({"method": PREFIX | {"rl": {"advantage": "rloo"}}}, "whose baseline is method.advantage"),
    ({"method": PREFIX | {"rl": {"overlong_tokens": 9}}}, "overlong_tokens = 9 with"),
    ({"method": PREFIX | {"advantage": "dr_grpo_prefix", "rl": {"advantage_std": True}}}, "or use 'shared'"),
    ({"method": PREFIX | {"advantage": "dr_grpo_prefix", "rl": {"rollouts_per_prompt": 2}}}, "Use at least 3"),
    ({"method": PREFIX | {"prefix_low_start": 0.96}}, "must not fall in this order"),
    ({"method": PREFIX | {"prefix_low_end": 0.5, "prefix_low_start": 0.4}}, "the shortest prefix becomes shorter"),
    (
        {"method": PREFIX | {"entropy_span": "continuation", "rl": {"entropy_coefficient": 0.0}}},
        "entropy_span = 'continuation' has no effect",
    ),
    ({"method": BREAD | {"success_low": 0.8}}, "so no group could be in between"),
    ({"method": BREAD | {"episodes": 1}}, "method.episodes = 1"),
    ({"method": SASR, "train": {"steps": 100}}, "warmup_steps = 100 leaves nothing"),
    ({"method": SASR | {"sft": {"updates_per_batch": 65}}}, "exceeds the 64 demonstrations"),
]


@pytest.mark.parametrize(("tables", "message"), CASES, ids=[message for _, message in CASES])
def test_refused(tables, message):
    with pytest.raises(ConfigError, match=message):
        check_config(decode(Config, tables))


@pytest.mark.parametrize(
    "tables",
    [
        {"method": UFT | {"hints": "uniform", "hint_coefficient": 0.0}},
        {"method": UFT | {"hints": "stage", "hint_steps": 6}},
        {"method": PREFIX | {"advantage": "dr_grpo_prefix_v2", "rl": {"rollouts_per_prompt": 3}}},
        {"method": PREFIX | {"entropy_span": "continuation"}},
        {"method": BREAD | {"success_low": 0.5, "episodes": 2}},
        {"method": SASR, "train": {"steps": 101}},
    ],
)
def test_the_remedy_works(tables):
    check_config(decode(Config, tables))
