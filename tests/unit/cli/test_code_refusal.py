"""Programs are refused without a sandbox before weights are loaded, unless the user says otherwise on the command line."""

import json
import shutil

import pytest

from mifo.cli import UNSAFE, main
from mifo.rewards import Grader
from mifo.types import Verdict


@pytest.fixture
def coding_files(tmp_path):
    """Training and held-out problems with tests; the demonstrations write a canary when they are run."""
    canary = tmp_path / "canary"
    for name, shift in (("train", 0), ("test", 100)):
        rows = [
            {
                "problem": f"Add {i}.",
                "answer": f"assert f(1) == {i + 1}",
                "grader": "code",
                "demonstration": f"```python\nopen({str(canary)!r}, 'w')\ndef f(x):\n    return x + {i}\n```",
            }
            for i in range(shift, shift + 70)
        ]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "train.jsonl", tmp_path / "test.jsonl", canary


def words(coding_files, tmp_path, *more):
    train, test, _ = coding_files
    data = [
        "--data.train",
        str(train),
        "--data.evaluation",
        str(test),
        "--data.families",
        "[]",
        "--data.levels",
        "none",
    ]
    return ["train", "tiny", *data, "--run.folder", str(tmp_path / "runs"), *more]


@pytest.mark.usefixtures("no_model_is_loaded")
@pytest.mark.parametrize("verify", ["--data.verify-demonstrations", "--data.no-verify-demonstrations"])
def test_training_on_code_is_refused(coding_files, tmp_path, monkeypatch, capsys, verify):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert main(words(coding_files, tmp_path, verify)) == 2
    message = capsys.readouterr().err
    assert "bubblewrap" in message
    assert UNSAFE in message
    assert not coding_files[2].exists()
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("no_model_is_loaded")
def test_measuring_on_code_is_refused(coding_files, model_folder, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert main(["eval", model_folder, "--data", str(coding_files[1])]) == 2
    assert UNSAFE in capsys.readouterr().err
    assert not coding_files[2].exists()


def test_the_flag_of_train_and_eval_reaches_the_grader(coding_files, tmp_path, model_folder, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    asked = []
    original = Grader.__init__
    monkeypatch.setattr(
        Grader, "__init__", lambda self, **settings: asked.append(settings) or original(self, **settings)
    )
    monkeypatch.setattr(Grader, "grade", lambda self, items: [Verdict.CORRECT] * len(items))
    assert main(words(coding_files, tmp_path, "--model.path", model_folder, UNSAFE, "--dry-run")) == 0
    assert (
        main(["eval", model_folder, "--data", str(coding_files[1]), "--limit", "3", "--max-tokens", "4", UNSAFE]) == 0
    )
    assert [settings["unsafe_code"] for settings in asked] == [True, True]
