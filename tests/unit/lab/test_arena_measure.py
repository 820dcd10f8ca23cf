"""How far a run moved, by hand; what is asked of a folder without an exported model."""

import json

import pytest
import torch
from safetensors.torch import save_file

from mifo.config.decode import encode
from mifo.config.load import load_config
from mifo.data.chartok import char_tokenizer
from mifo.errors import ModelError
from mifo.lab.arena_measure import main, measure, movement
from mifo.train.model import tiny_model


def test_movement_by_hand(tmp_path):
    start = {"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(2, 2)}
    save_file({"a": torch.tensor([3.0, 1.0])}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.full((2, 2), 2.0), "other": torch.ones(3)}, tmp_path / "model-2.safetensors")
    found = movement(start, tmp_path)
    assert found["l2"] == pytest.approx((9 + 16) ** 0.5)
    assert found["relative"] == pytest.approx(5 / 5)


def test_movement_keeps_what_single_precision_would_lose(tmp_path):
    """Half a unit in the last place, a thousand times over: an fp32 difference of squares would be noise."""
    start, change = {"a": torch.ones(1000)}, 2.0**-20
    save_file({"a": torch.full((1000,), 1.0 + change)}, tmp_path / "model.safetensors")
    assert movement(start, tmp_path)["l2"] == pytest.approx(1000**0.5 * change, rel=1e-12)


def test_a_missing_parameter_is_an_error(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match="lacks 1 parameters of the model, such as 'b'"):
        movement({"a": torch.zeros(1), "b": torch.zeros(1)}, tmp_path)


@pytest.fixture
def run_folder(tmp_path):
    """A run of seed 5 whose exported model is its start with one element moved by 0.5."""
    _, config = load_config("tiny", ["--train.threads", "1", "--train.seed", "5"])
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(encode(config)))
    model = tiny_model(5)
    with torch.no_grad():
        model.model.embed_tokens.weight[1, 1] += 0.5
    model.save_pretrained(folder / "export")
    char_tokenizer().save_pretrained(folder / "export")
    return folder


def test_a_run_is_measured_against_its_own_start(run_folder, capsys):
    """Tied weights count once; the start of `tiny` is that of the run's seed."""
    assert main([str(run_folder), "--ood", "embedded:test", "--problems", "7"]) == 0
    found = json.loads((run_folder / "measured.json").read_text())
    assert found["movement"]["l2"] == pytest.approx(0.5, rel=1e-6)
    norm = sum(p.detach().double().square().sum() for p in tiny_model(5).parameters()).sqrt()
    assert found["movement"]["relative"] == pytest.approx(0.5 / float(norm), rel=1e-6)
    assert len(found["ood"]) == 7
    assert found["ood_data"] == {"place": "embedded:test", "problems": 7}
    assert set(found["ood"].values()) <= {0.0, 1.0}


def test_without_other_problems(run_folder):
    found = measure(run_folder, ood=None, problems=1)
    assert set(found) == {"movement", "ood_data"}
    assert found["ood_data"] == {"place": "none", "problems": 0}


def test_a_folder_without_a_model(run_folder, capsys):
    for file in (run_folder / "export").glob("*.safetensors"):
        file.unlink()
    assert main([str(run_folder)]) == 2
    assert "lacks" in capsys.readouterr().err
    assert not (run_folder / "measured.json").exists()
