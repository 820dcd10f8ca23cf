"""The fork server that the kill and signal tests share, and the recipe they run."""

import random

import pytest
from kill_harness import Strike, Victims

RECIPE = """
description = "two phases, several updates a step, checkpoints every turn, in about a second"

[model]
path = "tiny"
compute = "float32"

[data]
families = ["tiny"]
train_problems = 30
evaluation_problems = 6

[rollout]
max_response_tokens = 12

[method]
name = "mifo"
buffer_size = 6
sft_batch_size = 4
token_fraction = 0.5

[method.rl]
prompts_per_step = 4
rollouts_per_prompt = 4
updates_per_step = 2
entropy_coefficient = 0.01

[rl_optimizer]
learning_rate = 1e-3
warmup_updates = 3
schedule = "cosine"
decay_updates = 30

[sft_optimizer]
learning_rate = 3e-3

[train]
steps = 6
threads = 1
micro_batch_tokens = 64

[evaluation]
every_steps = 3

[run]
checkpoint_steps = 1
keep_checkpoints = 2
export = false
"""


@pytest.fixture(scope="session")
def victims():
    with Victims() as server:
        yield server


@pytest.fixture(scope="session")
def recipe(tmp_path_factory):
    """The path of a small MIFO recipe."""
    path = tmp_path_factory.mktemp("recipe") / "killed.toml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="session")
def whole(victims, recipe, tmp_path_factory):
    """An uninterrupted run of it: (folder, what the process did)."""
    folder = tmp_path_factory.mktemp("whole")
    life = victims.run(["train", recipe, "--run.folder", folder, "--run.name", "run"], log=folder / "log")
    assert life.status == 0, (folder / "log").read_text()
    return folder / "run", life


@pytest.fixture(scope="session")
def survive(victims: Victims):
    """A function that runs any recipe to its end through kills at random moments of the regions given in turn.

    It takes a folder, the arguments of `mifo train` without folder and name, what an uninterrupted process did, the regions,
    a seed, and in which stay in the region each kill is to come (by default one of the first three); it returns the regions in
    which kills struck.
    """

    def run(folder, arguments, life, regions, seed, stays_in=()):
        draw, struck = random.Random(seed), []
        command = ["train", *arguments, "--run.folder", folder, "--run.name", "run"]
        for place, region in enumerate(regions):
            stays = life.stays[region]
            n = stays_in[place] if stays_in else draw.randint(1, min(len(stays), 3))
            strike = Strike(region, n, draw.uniform(0.0, stays[n - 1]))
            resume = ["--resume"] if (folder / "run" / "config.json").is_file() else []
            ended = victims.run([*command, *resume], log=folder / "log", strike=strike)
            assert ended.status in (-9, 0), (folder / "log").read_text()
            struck += [ended.struck] if ended.struck is not None and ended.status == -9 else []
        ended = victims.run([*command, "--resume"], log=folder / "log")
        assert ended.status == 0, (folder / "log").read_text()
        return struck

    return run
