"""Real processes are killed at random moments of every part of a run; in the end nothing differs.

MIFO_KILLS sets how many (50 for the full campaign).
"""

import os

import pytest
from kill_harness import contents, digest

KILLS = int(os.environ.get("MIFO_KILLS", "6"))
PER_RUN = 5
REGIONS = ("generation", "rl update", "phase switch", "sft update", "save", "evaluation")


def test_the_run_is_worth_killing(whole):
    _, life = whole
    for region in REGIONS:
        assert len(life.stays[region]) >= 3, region


@pytest.mark.parametrize("campaign", range(-(-KILLS // PER_RUN)))
def test_killed_again_and_again(survive, recipe, whole, tmp_path, campaign, record_property):
    folder, life = whole
    first = campaign * PER_RUN
    regions = [REGIONS[i % len(REGIONS)] for i in range(first, min(KILLS, first + PER_RUN))]
    struck = survive(tmp_path, [recipe], life, regions, seed=campaign)
    print("killed in", struck)
    assert struck
    assert contents(tmp_path / "run") == contents(folder)
    assert digest(tmp_path / "run") == digest(folder)


def test_another_recipe_and_flags(victims, survive, tmp_path):
    """The fixture takes any recipe: GRPO with a reference model, checkpoints in the foreground."""
    flags = ["grpo-smollm2", "--model.path", "tiny", "--data.families", "tiny", "--data.train-problems", "30"]
    flags += [
        "--data.evaluation",
        "none",
        "--rollout.max-response-tokens",
        "12",
        "--train.steps",
        "5",
        "--data.levels",
        "none",
    ]
    flags += [
        "--method.rl.prompts-per-step",
        "4",
        "--method.rl.rollouts-per-prompt",
        "4",
        "--run.checkpoint-steps",
        "1",
    ]
    flags += ["--method.rl.kl-coefficient", "0.1", "--train.threads", "1", "--run.no-export"]
    flags += ["--run.no-background-checkpoints", "--method.rl.updates-per-step", "1"]
    whole = victims.run(["train", *flags, "--run.folder", tmp_path / "a", "--run.name", "run"], log=tmp_path / "log")
    assert whole.status == 0, (tmp_path / "log").read_text()
    (tmp_path / "b").mkdir()
    assert survive(tmp_path / "b", flags, whole, ["rl update", "save"], seed=0)
    assert digest(tmp_path / "b" / "run") == digest(tmp_path / "a" / "run")


def test_a_lost_optimizer_would_be_noticed(whole, recipe, victims, tmp_path, monkeypatch):
    """The digest can fail: other settings give another one."""
    command = [
        "train",
        recipe,
        "--sft-optimizer.learning-rate",
        "2.9e-3",
        "--run.folder",
        tmp_path,
        "--run.name",
        "run",
    ]
    assert victims.run(command, log=tmp_path / "log").status == 0
    assert digest(tmp_path / "run") != digest(whole[0])
