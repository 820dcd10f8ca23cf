"""BREAD learns. It imitates nothing, so it begins from a model that some SFT has made answer right now and then."""

import json
from statistics import fmean

from mifo.cli import main


def run(folder, name, method, flags):
    """Train in `folder`/name with the model and data of `tiny`; returns the run folder."""
    recipe = folder / f"{name}.toml"
    recipe.write_text(f'extends = "tiny"\n[method]\nname = "{method}"\n', encoding="utf-8")
    common = [
        "--run.folder",
        str(folder),
        "--run.name",
        name,
        "--data.evaluation",
        "none",
        "--run.checkpoint-steps",
        "none",
    ]
    assert main(["train", str(recipe), *common, *flags]) == 0
    return folder / name


def test_bread_gets_more_answers_right_as_it_goes_on(tmp_path):
    able = run(tmp_path, "able", "sft", ["--train.steps", "168", "--method.batch-size", "8"])
    rollouts = ["--method.rl.prompts-per-step", "40", "--method.rl.rollouts-per-prompt", "4"]
    switches = [
        "--method.rl.updates-per-step",
        "1",
        "--method.rl.entropy-coefficient",
        "0",
        "--method.success-high",
        "1",
    ]
    rate = ["--rl-optimizer.learning-rate", "1e-3", "--train.steps", "20"]
    found = run(tmp_path, "bread", "bread", ["--model.path", str(able / "export"), *rollouts, *switches, *rate])
    records = [json.loads(line) for line in (found / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    accuracy = [record["accuracy"] for record in records]
    assert fmean(accuracy[-5:]) > 1.3 * fmean(accuracy[:5]) > 0
