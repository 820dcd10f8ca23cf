"""Real processes of each method are killed three times at random moments; in the end nothing differs.

MIFO_KILL_METHODS=all kills every method; without it those whose own state is of a kind of its own.
"""

import os

import pytest
from kill_harness import contents

from mifo.config.check import check_config
from mifo.config.decode import decode
from mifo.config.load import read_toml
from mifo.config.schema import Config
from mifo.lab.arena_toml import config_toml

RL = {"prompts_per_step": 4, "rollouts_per_prompt": 4, "updates_per_step": 2, "entropy_coefficient": 0.01}
OWN = {"prompts_per_step": 4, "rollouts_per_prompt": 3, "updates_per_step": 2}
PPO = {"name": "ppo", "critic_updates_per_step": 3}
PRIME = {"least_accuracy": 0.0, "most_accuracy": 1.0, "prm_updates_per_step": 2}
MIFO = {"rl": RL, "buffer_size": 6, "sft_batch_size": 4, "token_fraction": 0.5}
LORA = {"lora_rank": 4, "lora_alpha": 16.0}
METHODS = {
    "grpo": {"rl": RL | {"kl_coefficient": 0.1}},
    "sft": {"batch_size": 4, "sft": {"loss": "psft", "updates_per_batch": 2}},
    "mifo with lora": {**MIFO, "sft": LORA},
    "mifo with ppo": {**MIFO, "scorer": PPO},
    "relift": {"rl": RL, "buffer_size": 3},
    "luffy": {"rl": RL},
    "rl_with_sft": {"rl": RL},
    "sft_rl": {"rl": RL | {"kl_coefficient": 0.1}, "sft_steps": 2, "sft_batch_size": 4},
    "rl_sft": {"rl": RL, "rl_steps": 2, "sft_batch_size": 4},
    "multi_stage": {"rl": RL, "sft_steps": 1, "rl_steps": 1, "sft_batch_size": 4},
    "srft": OWN,
    "hpt": {"rl": RL},
    "superrl": {"rl": RL},
    "superrl by sigma": {"rl": RL, "gate": "log_sigma", "sigma_rate": 0.1},
    "chord": {"rl": RL, "demonstrations_per_step": 2, "mu_warmup_steps": 1, "mu_decay_steps": 4},
    "uft": {"rl": RL, "hint_coefficient": 1.0, "hint_steps": 3},
    "prefix_rft": {"rl": RL, "prefix_decay_steps": 4},
    "bread": {"rl": RL, "success_high": 1.0},
    "sasr": {"rl": RL | {"kl_coefficient": 0.1}, "warmup_steps": 1, "sft_batch_size": 4},
    "ppo": {"rl": RL, "critic_updates_per_step": 3},
    "prime": {"rl": RL, **PRIME},
}
UPDATES = ("second model", "sft update", "mixed update", "rl update")
FEW = ("mifo with ppo", "relift", "superrl by sigma", "sasr")
CHOSEN = METHODS if os.environ.get("MIFO_KILL_METHODS") == "all" else FEW


@pytest.mark.parametrize("name", CHOSEN)
def test_killed_three_times(victims, survive, recipe, tmp_path, name):
    tables = read_toml(recipe) | {"reward": {"incorrect": -0.5}}  # so that a critic has something to learn
    tables.pop("description")
    config = decode(Config, tables | {"method": {**METHODS[name], "name": name.split()[0]}})
    check_config(config)
    recipe = tmp_path / "killed.toml"
    recipe.write_text(config_toml(config, name))
    whole = victims.run(
        ["train", recipe, "--run.folder", tmp_path / "whole", "--run.name", "run"], log=tmp_path / "log"
    )
    assert whole.status == 0, (tmp_path / "log").read_text()
    regions = [region for region in list(whole.stays) if region in UPDATES]  # in the order in which a run comes to them
    regions = [*(["generation"] if whole.stays["generation"] else ["save"]), *regions, "save", "save"][:3]
    (tmp_path / "killed").mkdir()
    places = (2, 1, 1)  # the first not before there is a checkpoint; each of the others wherever the run stands then
    struck = survive(tmp_path / "killed", [recipe], whole, regions, seed=sum(map(ord, name)), stays_in=places)
    assert len(struck) == 3, (regions, struck)
    assert contents(tmp_path / "killed" / "run") == contents(tmp_path / "whole" / "run")
